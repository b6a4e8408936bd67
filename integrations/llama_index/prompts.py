"""Prompts behind documents: a template, the references that precede it, and the messages in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import SerializeAsAny
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate

from kv_memory import Reference

from .messages import message_with

__all__ = ["DOCUMENTS_ABOVE", "KV_QA_PROMPT", "CachedPrompt"]

KV_QA_PROMPT = PromptTemplate("{query_str}")
DOCUMENTS_ABOVE = "(see the documents above)"  # in the place of {context_str}


class CachedPrompt(BasePromptTemplate):
    """A template whose messages stand behind distilled caches.

    A template of its own, because `LLM.predict` and its kin take nothing else, and they send the events that
    tracing relies on. References and history are not formatted: braces in them are text.
    """

    inner: SerializeAsAny[BasePromptTemplate]
    before: list[ChatMessage]

    @classmethod
    def of(
        cls, template: BasePromptTemplate, references: Sequence[Reference], messages: Sequence[ChatMessage]
    ) -> CachedPrompt:
        """The template behind the caches of `references` and behind `messages`."""
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
        """What the LLM is given."""
        return [*self.before, *self.inner.format_messages(llm=llm, **self._filled(kwargs))]

    def get_template(self, llm: BaseLLM | None = None) -> str:
        """The text of the template, not filled in."""
        return self.inner.get_template(llm=llm)

    def _filled(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"context_str": DOCUMENTS_ABOVE, **kwargs}
