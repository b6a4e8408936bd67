"""Prompts that follow documents: the references, further messages, and a template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import SerializeAsAny
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate

from kv_memory import Reference

from ..references import DOCUMENTS_ABOVE
from .messages import message_with

__all__ = ["KV_QA_PROMPT", "CachedPrompt"]

KV_QA_PROMPT = PromptTemplate("{query_str}")


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
