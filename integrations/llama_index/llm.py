"""KVMemoryLLM: the memory's model as a LlamaIndex LLM that answers from distilled caches when given any."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

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
from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.core.prompts import BasePromptTemplate

from kv_memory import ConfigError, DecodeSettings, KVMemory, UnsupportedRequestError
from kv_memory.generate import Answer, AnswerStream, iterate_in_thread

from ..decoding import decode_settings
from ..schemas import closed
from .messages import references_of, turns_of

__all__ = ["KVMemoryLLM"]


class KVMemoryLLM(CustomLLM):
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

    Example:
        ```python
        memory = KVMemory.open("my-store")
        llm = KVMemoryLLM(memory, max_tokens=64)
        print(llm.complete("Write a haiku about ferries."))
        ```
    """

    max_tokens: int = Field(default=128, ge=1, description="Maximum length of an answer in tokens.")
    temperature: float = Field(default=0.0, ge=0, description="Sampling temperature; 0 decodes greedily.")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)
    timeout: float | None = Field(default=None, gt=0, description="Time limit of a call in seconds.")
    _memory: KVMemory = PrivateAttr()

    def __init__(self, memory: KVMemory, **options: Any) -> None:
        super().__init__(**options)
        self._memory = memory

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model: str | Path | None = None,
        keep_ratio: float | None = None,
        keep_tokens: int | None = None,
        max_bytes: int | None = None,
        collection: str = "default",
        **options: Any,
    ) -> KVMemoryLLM:
        """An LLM over a store that is opened or created; `memory.close()` when done. Errors as `KVMemory.open`.

        Args:
            path: The store's folder.
            model: A built-in model, a model folder, or a hub id; the model that the store records if None.
            keep_ratio: Share of the tokens kept, in (0, 1].
            keep_tokens: Number of tokens kept of each passage, instead of `keep_ratio`.
            max_bytes: Maximum size of a passage's cache file in bytes, instead of `keep_ratio`.
            collection: The collection (tenant) to read and write.
            **options: Options of the class.
        """
        memory = KVMemory.open(
            path,
            model=model,
            keep_ratio=keep_ratio,
            keep_tokens=keep_tokens,
            max_bytes=max_bytes,
            collection=collection,
        )
        return cls(memory, **options)

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serialises it."""
        return "KVMemoryLLM"

    @property
    def memory(self) -> KVMemory:
        """The memory that holds the caches and the model."""
        return self._memory

    @property
    def metadata(self) -> LLMMetadata:
        """The model's name, context window and capabilities."""
        backbone = self._memory.backbone
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
        return _completion(self._start(prompt, formatted, kwargs).answer)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`complete`, piece by piece."""
        stream = self._start(prompt, formatted, kwargs)
        return (_completion_part(text, delta, reply) for text, delta, reply in _parts(stream))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` without blocking the event loop."""
        return _completion(await _finish(lambda: self._start(prompt, formatted, kwargs)))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete` without blocking the event loop."""
        stream = await asyncio.to_thread(self._start, prompt, formatted, kwargs)
        return (_completion_part(text, delta, reply) async for text, delta, reply in _aparts(stream))

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
        return _chat(self._start_chat(messages, kwargs).answer)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat`, piece by piece."""
        stream = self._start_chat(messages, kwargs)
        return (_chat_part(text, delta, reply) for text, delta, reply in _parts(stream))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` without blocking the event loop."""
        return _chat(await _finish(lambda: self._start_chat(messages, kwargs)))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat` without blocking the event loop."""
        stream = await asyncio.to_thread(self._start_chat, messages, kwargs)
        return (_chat_part(text, delta, reply) async for text, delta, reply in _aparts(stream))

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
        raise UnsupportedRequestError(
            "this model cannot call tools",
            where="predict_and_call",
            next_step="Drive the agent with a model that can call tools, and give it this query engine as a tool.",
        )

    async def apredict_and_call(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `predict_and_call`."""
        self.predict_and_call()

    # -- the reader ----------------------------------------------------------------------------------------------

    def _settings(self, options: dict[str, Any]) -> DecodeSettings:
        mine = DecodeSettings(
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(self.stop),
            timeout_s=self.timeout,
        )
        return decode_settings(mine, options)

    def _start(self, prompt: str, formatted: bool, options: dict[str, Any]) -> AnswerStream:
        if references_of([], options) is None:
            if not formatted and self.completion_to_prompt not in (None, default_completion_to_prompt):
                assert self.completion_to_prompt is not None
                prompt, formatted = self.completion_to_prompt(prompt), True
            if formatted:
                return self._memory.reader.complete(prompt, settings=self._settings(options))
        return self._start_chat([ChatMessage(role=MessageRole.USER, content=prompt)], options)

    def _start_chat(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> AnswerStream:
        settings, reader = self._settings(options), self._memory.reader
        references, turns = references_of(messages, options), turns_of(messages)
        if references is not None:
            return reader.reply(turns, references, settings=settings)
        if self.messages_to_prompt not in (None, generic_messages_to_prompt):
            assert self.messages_to_prompt is not None
            return reader.complete(self.messages_to_prompt(messages), settings=settings)
        return reader.reply_alone(turns, settings=settings)


def _parts(stream: AnswerStream) -> Iterator[tuple[str, str, Answer | None]]:
    """Yields `(text so far, new text, None)`, and at the end `(text, "", reply)`."""
    text = held = ""
    try:
        for piece in stream:
            delta, held = _stripped(text, held + piece)
            if delta:
                text += delta
                yield text, delta, None
        yield text, "", stream.answer
    finally:
        stream.close()


async def _aparts(stream: AnswerStream) -> AsyncIterator[tuple[str, str, Answer | None]]:
    text = held = ""
    async for piece in iterate_in_thread(stream):
        delta, held = _stripped(text, held + piece)
        if delta:
            text += delta
            yield text, delta, None
    yield text, "", stream.answer


def _stripped(text: str, piece: str) -> tuple[str, str]:
    """The text that a piece adds, and its trailing white space, which is held back until more text follows.

    Streamed answers must equal whole ones, which are stripped.
    """
    piece = piece if text else piece.lstrip()
    delta = piece.rstrip()
    return delta, piece[len(delta) :]


async def _finish(start: Callable[[], AnswerStream]) -> Answer:
    """Decode token by token, not in one call in a thread, so that a cancelled task stops decoding."""
    stream = await asyncio.to_thread(start)
    async for _ in iterate_in_thread(stream):
        pass
    return stream.answer


def _filled_in(output_cls: type[BaseModel], response: ChatResponse) -> BaseModel:
    raw: Any = response.raw
    if raw["finish_reason"] == "length":
        raise ConfigError(
            "the answer was cut off before its JSON was complete",
            where="max_tokens",
            next_step="Raise max_tokens of the LLM, or limit the strings and lists of the output class.",
        )
    return output_cls.model_validate_json(response.message.content or "")


def _raw(reply: Answer) -> dict[str, Any]:
    prompt_tokens = reply.n_prompt_tokens + reply.n_cached_tokens
    return {
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": reply.n_new_tokens,
            "total_tokens": prompt_tokens + reply.n_new_tokens,
            "prompt_tokens_details": {"cached_tokens": reply.n_cached_tokens},
        },
        "finish_reason": reply.finish_reason,
        "ttft_s": reply.ttft_s,
        "total_s": reply.total_s,
        "damaged": list(reply.damaged),
        **({} if reply.next_step is None else {"next_step": reply.next_step}),
    }


def _completion(reply: Answer) -> CompletionResponse:
    return CompletionResponse(text=reply.text.strip(), raw=_raw(reply))


def _completion_part(text: str, delta: str, reply: Answer | None) -> CompletionResponse:
    return CompletionResponse(text=text, delta=delta, raw=None if reply is None else _raw(reply))


def _chat(reply: Answer) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=reply.text.strip()), raw=_raw(reply))


def _chat_part(text: str, delta: str, reply: Answer | None) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, raw=None if reply is None else _raw(reply))
