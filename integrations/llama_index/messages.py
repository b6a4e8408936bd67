"""LlamaIndex's messages as turns, and messages and prompts that carry references to distilled caches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock
from llama_index.core.bridge.pydantic import SerializeAsAny
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate

from kv_memory import Reference, Turn

from ..llms import REASONING, ROLES, log_left_out, readable, refuse_content, refuse_tools
from ..references import DOCUMENTS_ABOVE, KV_IDS, reference_options

KV_QA_PROMPT = PromptTemplate("{query_str}")


def message_with(references: Iterable[Reference]) -> ChatMessage:
    """An empty message that carries references."""
    return ChatMessage(role=MessageRole.SYSTEM, content="", additional_kwargs=reference_options(references))


def turns_of(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Messages as turns, without the reasoning of models and without messages that only carry references.

    Raises:
        UnsupportedRequestError: A message is from or for a tool, or contains more than text.
    """
    turns: list[Turn] = []
    for message in messages:
        role, where = ROLES.get(message.role.value), f"role {message.role.value!r}"
        if role is None or message.additional_kwargs.get("tool_calls"):
            refuse_tools(where=f"message of {where}")
        reasoning = {kind for kind, value in message.additional_kwargs.items() if value} & REASONING
        for block in message.blocks:
            if block.block_type in REASONING:
                reasoning.add(type(block).__name__)
            elif not isinstance(block, TextBlock):
                refuse_content(f"a {type(block).__name__}", where=where)
        for kind in reasoning:
            log_left_out(kind)
        text = readable("\n".join(block.text for block in message.blocks if isinstance(block, TextBlock)))
        if text.strip() or not (reasoning or KV_IDS in message.additional_kwargs):
            turns.append(Turn(role, text))
    return turns


class CachedPrompt(BasePromptTemplate):
    """A template with messages that follow distilled caches.

    It is a template because `LLM.predict` and similar methods accept nothing else, and they emit the events that
    tracing relies on. References and history are not formatted: braces in them are text.
    """

    inner: SerializeAsAny[BasePromptTemplate]
    before: list[ChatMessage]

    @classmethod
    def of(
        cls, template: BasePromptTemplate, references: Sequence[Reference], messages: Sequence[ChatMessage]
    ) -> CachedPrompt:
        """The template, after the caches of `references` and after `messages`."""
        return cls(
            inner=template,
            before=[message_with(references), *messages],
            metadata=template.metadata,
            template_vars=template.template_vars,
            kwargs=template.kwargs,
            output_parser=template.output_parser,
        )

    def partial_format(self, **kwargs: Any) -> CachedPrompt:
        """As in LlamaIndex."""
        return self.model_copy(update={"inner": self.inner.partial_format(**kwargs)})

    def format(self, llm: BaseLLM | None = None, **kwargs: Any) -> str:
        """The text of the template; the references are not text."""
        return self.inner.format(llm=llm, **self._filled(kwargs))

    def format_messages(self, llm: BaseLLM | None = None, **kwargs: Any) -> list[ChatMessage]:
        """The messages for the LLM."""
        return [*self.before, *self.inner.format_messages(llm=llm, **self._filled(kwargs))]

    def get_template(self, llm: BaseLLM | None = None) -> str:
        """The text of the template, before formatting."""
        return self.inner.get_template(llm=llm)

    def _filled(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"context_str": DOCUMENTS_ABOVE, **kwargs}
