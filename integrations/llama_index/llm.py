"""KVMemoryLLM: the memory's model as a LlamaIndex LLM that answers from distilled caches when given any."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from llama_index.core.base.llms.generic_utils import (
    astream_chat_response_to_completion_response,
    chat_response_to_completion_response,
    stream_chat_response_to_completion_response,
)
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
from kv_memory.generate import Answer, AnswerStream

from ..llms import (
    MemoryLLM,
    answer_in_thread,
    closed,
    readable,
    refuse_tools,
    reply_details,
    trimmed,
    trimmed_in_thread,
)
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
    `MemoryLLM` describes the options, and the errors of a call.

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

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt: as the only user message, or verbatim with `formatted`. Errors as in `chat`."""
        return chat_response_to_completion_response(_whole(self._start(prompt, formatted, kwargs).answer))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`complete`, piece by piece."""
        return stream_chat_response_to_completion_response(_parts(self._start(prompt, formatted, kwargs)))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` without blocking the event loop."""
        reply = await answer_in_thread(self._start, prompt, formatted, kwargs)
        return chat_response_to_completion_response(_whole(reply))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete` without blocking the event loop."""
        stream = await asyncio.to_thread(self._start, prompt, formatted, kwargs)
        return astream_chat_response_to_completion_response(_aparts(stream))

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Reply to messages, from caches if they or the options contain references (`kv_ids`); errors: `MemoryLLM`."""
        return _whole(self._start_chat(messages, kwargs).answer)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat`, piece by piece."""
        return _parts(self._start_chat(messages, kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` without blocking the event loop."""
        return _whole(await answer_in_thread(self._start_chat, messages, kwargs))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat` without blocking the event loop."""
        return _aparts(await asyncio.to_thread(self._start_chat, messages, kwargs))

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
        messages, options = self._get_messages(prompt, **prompt_args), _by_schema(output_cls, llm_kwargs)
        return _filled_in(output_cls, self.chat(messages, **options))

    async def astructured_predict(
        self,
        output_cls: type[BaseModel],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> BaseModel:
        """`structured_predict` without blocking the event loop."""
        messages, options = self._get_messages(prompt, **prompt_args), _by_schema(output_cls, llm_kwargs)
        return _filled_in(output_cls, await self.achat(messages, **options))

    def predict_and_call(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the model cannot choose tools."""
        refuse_tools(where="predict_and_call")

    async def apredict_and_call(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `predict_and_call`."""
        self.predict_and_call()

    def _start(self, prompt: str, formatted: bool, options: dict[str, Any]) -> AnswerStream:
        if references_in(options) is None:
            if not formatted and self.completion_to_prompt not in (None, default_completion_to_prompt):
                assert self.completion_to_prompt is not None
                prompt, formatted = self.completion_to_prompt(prompt), True
            if formatted:
                return self.memory.reader.complete(readable(prompt), settings=self._decode_settings(options))
        return self._start_chat([ChatMessage(role=MessageRole.USER, content=prompt)], options)

    def _start_chat(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> AnswerStream:
        settings, reader = self._decode_settings(options), self.memory.reader
        references = references_in(*(message.additional_kwargs for message in messages), options)
        turns = turns_of(messages)
        if references is not None:
            return reader.reply(turns, references, settings=settings)
        if self.messages_to_prompt not in (None, generic_messages_to_prompt):
            assert self.messages_to_prompt is not None
            return reader.complete(readable(self.messages_to_prompt(messages)), settings=settings)
        return reader.reply_alone(turns, settings=settings)


def _parts(stream: AnswerStream) -> ChatResponseGen:
    text = ""
    for delta in trimmed(stream):
        text += delta
        yield _response(text, delta=delta)
    yield _response(text, delta="", reply=stream.answer)


async def _aparts(stream: AnswerStream) -> ChatResponseAsyncGen:
    text = ""
    async for delta in trimmed_in_thread(stream):
        text += delta
        yield _response(text, delta=delta)
    yield _response(text, delta="", reply=stream.answer)


def _whole(reply: Answer) -> ChatResponse:
    return _response(reply.text.strip(), reply=reply)


def _response(text: str, *, delta: str | None = None, reply: Answer | None = None) -> ChatResponse:
    """A response with the text so far, the new text of a part, and the usage once the reply is complete."""
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, raw=None if reply is None else _raw(reply))


def _by_schema(output_cls: type[BaseModel], options: dict[str, Any] | None) -> dict[str, Any]:
    return {**(options or {}), "json_schema": json.dumps(closed(output_cls.model_json_schema()))}


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
        "damaged": list(reply.damaged),
        **reply_details(reply),
    }
