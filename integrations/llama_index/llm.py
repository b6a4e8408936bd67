"""KVMemoryLLM: the memory's model as a LlamaIndex LLM that answers from distilled caches when given any."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.core.prompts import BasePromptTemplate

from kv_memory import ConfigError
from kv_memory.generate import Answer, AnswerStream, iterate_in_thread

from ..llms import MemoryLLM, Trim, closed, refuse_tools, reply_details
from ..references import references_in
from .messages import turns_of


class KVMemoryLLM(MemoryLLM, CustomLLM):
    """A LlamaIndex LLM over the model of a `KVMemory`.

    Without references it is an ordinary LLM: chats and completions go through the model's own chat template (or
    `messages_to_prompt` and `completion_to_prompt`, if given). References are `kv_ids`, an option of the call or of a
    message's `additional_kwargs`. With them it answers from the distilled caches that they name, and no document text
    enters the prompt.

    Safe to use from several threads and tasks. The asynchronous forms run the model in a thread, token by token, and
    stop within a token when they are cancelled. A response's `raw` holds `usage` in OpenAI's format (`prompt_tokens`
    includes cached entries, `prompt_tokens_details.cached_tokens` reports them), `finish_reason`, `ttft_s`, `total_s`,
    `damaged` (keys of damaged caches, answered from the text), and for an empty answer `next_step`, a suggestion.

    Args:
        memory: An open memory; its model is loaded at the first use.
        max_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature; 0 decodes greedily.
        top_p: Probability of the smallest set of tokens to sample from.
        top_k: Number of likeliest tokens to sample from; 0 for all.
        seed: Seed for repeatable sampling.
        stop: Strings that end an answer.
        timeout: Time limit of a call in seconds, after which it raises `DecodeTimeoutError`.

    Raises:
        ConfigError: An option is unknown or out of range (pydantic's `ValidationError` if it has the wrong type).

    Example:
        ```python
        memory = KVMemory.open("my-store")
        llm = KVMemoryLLM(memory, max_tokens=64)
        print(llm.complete("Write a haiku about ferries."))
        ```
    """

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serialises it."""
        return "KVMemoryLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """The model's name, context window and capabilities."""
        backbone = self.memory.backbone
        return LLMMetadata(
            context_window=backbone.context_window,
            num_output=self.max_tokens,
            is_chat_model=True,
            is_function_calling_model=False,
            model_name=backbone.name,
        )

    # -- completions ---------------------------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt: as the only user message, or verbatim with `formatted`. Errors as in `chat`."""
        return _completion(_whole(self._start(prompt, formatted, kwargs).answer))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`complete`, piece by piece."""
        stream = self._start(prompt, formatted, kwargs)
        return (_completion(part) for part in _parts(stream))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` without blocking the event loop."""
        return _completion(await _awhole(self._start, prompt, formatted, kwargs))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete` without blocking the event loop."""
        stream = await asyncio.to_thread(self._start, prompt, formatted, kwargs)
        return (_completion(part) async for part in _aparts(stream))

    # -- chats ---------------------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Reply to messages, from caches if the messages or options contain references (`kv_ids`).

        Raises:
            UnsupportedRequestError: The messages or options contain tools, images or audio.
            CacheNotFoundError: A reference has no cache in the store, and no text came with it.
            FingerprintMismatchError: A cache was made by another model, adapter or prompt.
            ContextWindowError: The caches and messages do not fit the model's context window.
            DecodeTimeoutError: The call took longer than `timeout`.
        """
        return _chat(_whole(self._start_chat(messages, kwargs).answer))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat`, piece by piece."""
        stream = self._start_chat(messages, kwargs)
        return (_chat(part) for part in _parts(stream))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` without blocking the event loop."""
        return _chat(await _awhole(self._start_chat, messages, kwargs))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat` without blocking the event loop."""
        stream = await asyncio.to_thread(self._start_chat, messages, kwargs)
        return (_chat(part) async for part in _aparts(stream))

    # -- structured answers --------------------------------------------------------------------------------------

    def structured_predict(
        self,
        output_cls: type[BaseModel],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> BaseModel:
        """Fill in a pydantic model: only tokens that lead to JSON of its schema are decoded.

        Raises:
            ConfigError: `max_tokens` is too small, llguidance is not installed, or it does not support the schema.
        """
        options = {**(llm_kwargs or {}), "json_schema": json.dumps(closed(output_cls.model_json_schema()))}
        response = self.chat(self._get_messages(prompt, **prompt_args), **options)
        return _filled_in(output_cls, response)

    async def astructured_predict(
        self,
        output_cls: type[BaseModel],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> BaseModel:
        """`structured_predict` without blocking the event loop."""
        options = {**(llm_kwargs or {}), "json_schema": json.dumps(closed(output_cls.model_json_schema()))}
        response = await self.achat(self._get_messages(prompt, **prompt_args), **options)
        return _filled_in(output_cls, response)

    def predict_and_call(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the model cannot choose tools."""
        refuse_tools(where="predict_and_call")

    async def apredict_and_call(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `predict_and_call`."""
        self.predict_and_call()

    # -- the reader ----------------------------------------------------------------------------------------------

    def _start(self, prompt: str, formatted: bool, options: dict[str, Any]) -> AnswerStream:
        if references_in(options) is None:
            if not formatted and self.completion_to_prompt not in (None, default_completion_to_prompt):
                assert self.completion_to_prompt is not None
                prompt, formatted = self.completion_to_prompt(prompt), True
            if formatted:
                return self.memory.reader.complete(prompt, settings=self._decode_settings(options))
        return self._start_chat([ChatMessage(role=MessageRole.USER, content=prompt)], options)

    def _start_chat(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> AnswerStream:
        settings, reader = self._decode_settings(options), self.memory.reader
        references = references_in(*(message.additional_kwargs for message in messages), options)
        turns = turns_of(messages)
        if references is not None:
            return reader.reply(turns, references, settings=settings)
        if self.messages_to_prompt not in (None, generic_messages_to_prompt):
            assert self.messages_to_prompt is not None
            return reader.complete(self.messages_to_prompt(messages), settings=settings)
        return reader.reply_alone(turns, settings=settings)


class _Part(NamedTuple):
    """A part of an answer as it streams: the text so far, the new text, and at the end the reply."""

    text: str
    delta: str | None
    reply: Answer | None


def _parts(stream: AnswerStream) -> Iterator[_Part]:
    text, trim = "", Trim()
    try:
        for piece in stream:
            if delta := trim(piece):
                text += delta
                yield _Part(text, delta, None)
        yield _Part(text, "", stream.answer)
    finally:
        stream.close()


async def _aparts(stream: AnswerStream) -> AsyncIterator[_Part]:
    text, trim = "", Trim()
    async for piece in iterate_in_thread(stream):
        if delta := trim(piece):
            text += delta
            yield _Part(text, delta, None)
    yield _Part(text, "", stream.answer)


def _whole(reply: Answer) -> _Part:
    return _Part(reply.text.strip(), None, reply)


async def _awhole(start: Callable[..., AnswerStream], *arguments: Any) -> _Part:
    """Decode token by token, not in one call in a thread, so that a cancelled task stops decoding."""
    stream = await asyncio.to_thread(start, *arguments)
    async for _ in iterate_in_thread(stream):
        pass
    return _whole(stream.answer)


def _filled_in(output_cls: type[BaseModel], response: ChatResponse) -> BaseModel:
    raw: Any = response.raw
    if raw["finish_reason"] == "length":
        raise ConfigError(
            "the answer was cut off before its JSON was complete",
            where="max_tokens",
            next_step="Raise max_tokens of the LLM, or limit the strings and lists of the output class.",
        )
    return output_cls.model_validate_json(response.message.content or "")


def _completion(part: _Part) -> CompletionResponse:
    return CompletionResponse(text=part.text, delta=part.delta, raw=_raw(part.reply))


def _chat(part: _Part) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=part.text)
    return ChatResponse(message=message, delta=part.delta, raw=_raw(part.reply))


def _raw(reply: Answer | None) -> dict[str, Any] | None:
    if reply is None:
        return None
    prompt_tokens = reply.n_prompt_tokens + reply.n_cached_tokens
    return {
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": reply.n_new_tokens,
            "total_tokens": prompt_tokens + reply.n_new_tokens,
            "prompt_tokens_details": {"cached_tokens": reply.n_cached_tokens},
        },
        "damaged": list(reply.damaged),
        **reply_details(reply),
    }
