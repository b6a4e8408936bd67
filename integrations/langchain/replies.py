"""Converts the reader's replies to LangChain's messages, whole and in parts."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from kv_memory.generate import Answer, AnswerStream, iterate_in_thread

from ..llms import reply_details

PROVIDER = "kv_memory"


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
        **reply_details(reply),
    }


def _usage(reply: Answer) -> UsageMetadata:
    n_input = reply.n_prompt_tokens + reply.n_cached_tokens
    return UsageMetadata(
        input_tokens=n_input,
        output_tokens=reply.n_new_tokens,
        total_tokens=n_input + reply.n_new_tokens,
        input_token_details=InputTokenDetails(cache_read=reply.n_cached_tokens),
    )
