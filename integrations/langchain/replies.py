"""Converts the reader's replies to LangChain's messages, whole and in parts."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from kv_memory.generate import Answer, AnswerStream, iterate_in_thread

__all__ = ["PROVIDER", "Trim", "last", "part", "steps", "whole"]

PROVIDER = "kv_memory"


class Trim:
    """Strips white space around a streamed answer; trailing white space is held back until more text follows."""

    def __init__(self) -> None:
        self._held: str | None = None  # None before the first text

    def __call__(self, piece: str) -> str:
        """The text that can be emitted after this piece."""
        whole = piece.lstrip() if self._held is None else self._held + piece
        text = whole.rstrip()
        if text:
            self._held = whole[len(text) :]
        elif self._held is not None:
            self._held = whole
        return text


def steps(stream: AnswerStream) -> aclosing[AsyncGenerator[str, None]]:
    """The pieces of a stream, each decoded in a thread; closed on exit, not when garbage is collected."""
    return aclosing(cast("AsyncGenerator[str, None]", iterate_in_thread(stream)))


def whole(reply: Answer, model_name: str) -> ChatResult:
    """A whole answer."""
    message = AIMessage(
        content=reply.text.strip(), usage_metadata=_usage(reply), response_metadata=_metadata(reply, model_name)
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def part(text: str) -> ChatGenerationChunk:
    """A piece of an answer."""
    return ChatGenerationChunk(message=AIMessageChunk(content=text))


def last(reply: Answer, model_name: str) -> ChatGenerationChunk:
    """The usage and metadata, after the last piece: LangChain adds chunks up, so only one of them may carry them."""
    message = AIMessageChunk(
        content="",
        usage_metadata=_usage(reply),
        response_metadata=_metadata(reply, model_name),
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message)


def _metadata(reply: Answer, model_name: str) -> dict[str, Any]:
    return {
        "model_name": model_name,
        "model_provider": PROVIDER,
        "finish_reason": reply.finish_reason,
        "ttft_s": reply.ttft_s,
        "total_s": reply.total_s,
        **({} if reply.next_step is None else {"next_step": reply.next_step}),
    }


def _usage(reply: Answer) -> UsageMetadata:
    n_input = reply.n_prompt_tokens + reply.n_cached_tokens
    return UsageMetadata(
        input_tokens=n_input,
        output_tokens=reply.n_new_tokens,
        total_tokens=n_input + reply.n_new_tokens,
        input_token_details=InputTokenDetails(cache_read=reply.n_cached_tokens),
    )
