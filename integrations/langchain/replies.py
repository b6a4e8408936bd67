"""From the reader's replies to LangChain's messages, whole and in parts."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from kv_memory.generate import iterate_in_thread
from kv_memory.query import Reply, ReplyStream

__all__ = ["PROVIDER", "Trim", "last", "part", "steps", "whole"]

PROVIDER = "kv_memory"


class Trim:
    """White space around an answer is dropped: at the end it is held back until something follows."""

    def __init__(self) -> None:
        self._held: str | None = None  # None until there was text

    def __call__(self, piece: str) -> str:
        """What can be told of a piece now."""
        whole = piece.lstrip() if self._held is None else self._held + piece
        text = whole.rstrip()
        if text:
            self._held = whole[len(text) :]
        elif self._held is not None:
            self._held = whole
        return text


def steps(stream: ReplyStream) -> aclosing[AsyncGenerator[str, None]]:
    """The pieces of a stream, each decoded in a thread; closed when they are left, not when they are collected."""
    return aclosing(cast("AsyncGenerator[str, None]", iterate_in_thread(stream)))


def whole(reply: Reply, model_name: str) -> ChatResult:
    """A whole answer."""
    message = AIMessage(
        content=reply.text.strip(), usage_metadata=_usage(reply), response_metadata=_metadata(reply, model_name)
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def part(text: str) -> ChatGenerationChunk:
    """A piece of an answer."""
    return ChatGenerationChunk(message=AIMessageChunk(content=text))


def last(reply: Reply, model_name: str) -> ChatGenerationChunk:
    """The figures, behind the last piece: parts are added up, so that they may stand on one of them only."""
    message = AIMessageChunk(
        content="",
        usage_metadata=_usage(reply),
        response_metadata=_metadata(reply, model_name),
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message)


def _metadata(reply: Reply, model_name: str) -> dict[str, Any]:
    return {
        "model_name": model_name,
        "model_provider": PROVIDER,
        "finish_reason": reply.finish_reason,
        "ttft_s": reply.ttft_s,
        "total_s": reply.total_s,
        **({} if reply.next_step is None else {"next_step": reply.next_step}),
    }


def _usage(reply: Reply) -> UsageMetadata:
    n_input = reply.n_prompt_tokens + reply.n_cached_tokens
    return UsageMetadata(
        input_tokens=n_input,
        output_tokens=reply.n_new_tokens,
        total_tokens=n_input + reply.n_new_tokens,
        input_token_details=InputTokenDetails(cache_read=reply.n_cached_tokens),
    )
