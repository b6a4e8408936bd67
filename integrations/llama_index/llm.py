"""KVMemoryLLM: the store's model as a LlamaIndex LLM, which answers from distilled caches where it is given any."""

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
from kv_memory.generate import iterate_in_thread
from kv_memory.query import Reply, ReplyStream

from ..decoding import decode_settings
from ..schemas import closed
from .messages import references_of, turns_of

__all__ = ["KVMemoryLLM"]


class KVMemoryLLM(CustomLLM):
    """A LlamaIndex LLM over the model of a `KVMemory`.

    Without references it is an ordinary LLM: chats and completions go through the model's own chat template (or
    `messages_to_prompt` and `completion_to_prompt`, if they are given). With them (`kv_ids`, as an option of the call
    or in a message's `additional_kwargs`) it answers from the distilled caches they name, and no text of documents
    enters the prompt.

    Safe to use from several threads and tasks. The asynchronous forms run the model in a thread, token by token, and
    stop within a token when they are cancelled. A response's `raw` holds `usage` in OpenAI's words (cached entries
    are counted in `prompt_tokens` and named in `prompt_tokens_details.cached_tokens`), `finish_reason`, `ttft_s` and
    `total_s`; where the answer is empty also `next_step`, what to try.

    Args:
        memory: An open store; its model is loaded at the first use.
        max_tokens: The longest answer, in tokens.
        temperature: 0 decodes greedily.
        top_p: Sample from the smallest set of tokens with this much probability.
        top_k: Sample from the k likeliest tokens only; 0 for all.
        seed: Makes sampling repeatable.
        stop: Strings that end an answer.
        timeout: Seconds, after which a call is broken off with `DecodeTimeoutError`.

    Example:
        ```python
        memory = KVMemory.open("my-store")
        llm = KVMemoryLLM(memory, max_tokens=64)
        print(llm.complete("Write a haiku about ferries."))
        ```
    """

    max_tokens: int = Field(default=128, ge=1, description="The longest answer, in tokens.")
    temperature: float = Field(default=0.0, ge=0, description="0 decodes greedily.")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)
    timeout: float | None = Field(default=None, gt=0, description="Seconds.")
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
        """An LLM over a store that is opened, or made, for it; `memory.close()` when done. Errors as `KVMemory.open`.

        Args:
            path: The store's folder.
            model: A built-in model, a model folder, or a hub id; what the store remembers if None.
            keep_ratio: Share of the tokens kept, in (0, 1].
            keep_tokens: In its place, how many tokens are kept of each passage.
            max_bytes: In its place, the largest file of a passage's cache, in bytes.
            collection: The tenant whose caches are seen.
            **options: Those of the class.
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
        """The name LlamaIndex keeps it under."""
        return "KVMemoryLLM"

    @property
    def memory(self) -> KVMemory:
        """The store whose caches and model this is."""
        return self._memory

    @property
    def metadata(self) -> LLMMetadata:
        """What the model can do."""
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
        """Answer a prompt: as the user's only message, or with `formatted` as it stands. Errors as in `chat`."""
        return _completion(self._start(prompt, formatted, kwargs).reply)

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
        """Reply to messages; those that bring references (`kv_ids`) are replied to from caches.

        Raises:
            UnsupportedRequestError: Tools, images or audio are among them.
            CacheNotFoundError: A reference has no cache in the store, and no text came with it.
            FingerprintMismatchError: A cache was made by another model, adapter or prompt.
            ContextWindowError: All of it does not fit the model.
            DecodeTimeoutError: It took longer than `timeout`.
        """
        return _chat(self._start_chat(messages, kwargs).reply)

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
            ConfigError: `max_tokens` are too few for it, llguidance is not installed, or cannot follow the schema.
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
            next_step="Drive the agent with a model that can, and give it this query engine as a tool.",
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

    def _start(self, prompt: str, formatted: bool, options: dict[str, Any]) -> ReplyStream:
        if references_of([], options) is None:
            if not formatted and self.completion_to_prompt not in (None, default_completion_to_prompt):
                assert self.completion_to_prompt is not None
                prompt, formatted = self.completion_to_prompt(prompt), True
            if formatted:
                return self._memory.reader.complete(prompt, settings=self._settings(options))
        return self._start_chat([ChatMessage(role=MessageRole.USER, content=prompt)], options)

    def _start_chat(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> ReplyStream:
        settings, reader = self._settings(options), self._memory.reader
        references, turns = references_of(messages, options), turns_of(messages)
        if references is not None:
            return reader.reply(turns, references, settings=settings)
        if self.messages_to_prompt not in (None, generic_messages_to_prompt):
            assert self.messages_to_prompt is not None
            return reader.complete(self.messages_to_prompt(messages), settings=settings)
        return reader.reply_alone(turns, settings=settings)


def _parts(stream: ReplyStream) -> Iterator[tuple[str, str, Reply | None]]:
    """Text so far and what is new of it; at the end, without new text, the reply with its figures."""
    text = held = ""
    try:
        for piece in stream:
            delta, held = _stripped(text, held + piece)
            if delta:
                text += delta
                yield text, delta, None
        yield text, "", stream.reply
    finally:
        stream.close()


async def _aparts(stream: ReplyStream) -> AsyncIterator[tuple[str, str, Reply | None]]:
    text = held = ""
    async for piece in iterate_in_thread(stream):
        delta, held = _stripped(text, held + piece)
        if delta:
            text += delta
            yield text, delta, None
    yield text, "", stream.reply


def _stripped(text: str, piece: str) -> tuple[str, str]:
    """What a piece adds to the text so far, and the white space at its end, held back until more text follows.

    Because whole answers are stripped, and streamed ones are to be the same.
    """
    piece = piece if text else piece.lstrip()
    delta = piece.rstrip()
    return delta, piece[len(delta) :]


async def _finish(start: Callable[[], ReplyStream]) -> Reply:
    """Decode token by token, not in one call to a thread, so that a cancelled task leaves none behind."""
    stream = await asyncio.to_thread(start)
    async for _ in iterate_in_thread(stream):
        pass
    return stream.reply


def _filled_in(output_cls: type[BaseModel], response: ChatResponse) -> BaseModel:
    raw: Any = response.raw
    if raw["finish_reason"] == "length":
        raise ConfigError(
            "the answer was cut off before its JSON was complete",
            where="max_tokens",
            next_step="Raise max_tokens of the LLM, or bound the strings and lists of the model.",
        )
    return output_cls.model_validate_json(response.message.content or "")


def _raw(reply: Reply) -> dict[str, Any]:
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


def _completion(reply: Reply) -> CompletionResponse:
    return CompletionResponse(text=reply.text.strip(), raw=_raw(reply))


def _completion_part(text: str, delta: str, reply: Reply | None) -> CompletionResponse:
    return CompletionResponse(text=text, delta=delta, raw=None if reply is None else _raw(reply))


def _chat(reply: Reply) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=reply.text.strip()), raw=_raw(reply))


def _chat_part(text: str, delta: str, reply: Reply | None) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, raw=None if reply is None else _raw(reply))
