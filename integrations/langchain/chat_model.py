"""ChatKVMemory: the memory's model as a LangChain chat model that answers from distilled caches when given any."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool

from kv_memory import ConfigError, KVMemory
from kv_memory.generate import Answer, AnswerStream, iterate_in_thread

from ..llms import MemoryLLM, Trim, refuse_tools, reply_details
from ..references import references_in
from .messages import recalled, turns_of
from .structured import structured

_PROVIDER = "kv_memory"


class ChatKVMemory(MemoryLLM, BaseChatModel):
    """A LangChain chat model over the model of a `KVMemory`.

    Without references it is an ordinary chat model with the model's own chat template. References are `kv_ids`, an
    option of a call or of `bind`, with the values of `metadata["kv_id"]` of retrieved documents. With them it answers
    from the distilled caches that they name, and no document text enters the prompt. `kv_texts`, `{key: text}`, gives
    the text to prefill where a reference has no cache. An empty `kv_ids` list still means "from caches", with no
    documents.

    Safe to use from several threads and tasks. The asynchronous forms run the model in a thread, token by token, and
    stop within a token when they are cancelled. `usage_metadata` includes cached entries in `input_tokens` and reports
    them in `input_token_details["cache_read"]`. `response_metadata` has `model_name`, `model_provider`,
    `finish_reason`, `ttft_s` and `total_s` (both in seconds), and for an empty answer `next_step`, a suggestion.
    Options that only concern hosted models (`api_key`, `base_url`, `max_retries`) are ignored.

    Args:
        memory: An open memory. Its model is loaded now, unless it already is.
        max_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature; 0 decodes greedily.
        top_p: Probability of the smallest set of tokens to sample from.
        top_k: Number of likeliest tokens to sample from; 0 for all.
        seed: Seed for repeatable sampling.
        stop: Strings that end an answer.
        timeout: Time limit of a call in seconds, after which it raises `DecodeTimeoutError`.
        streaming: Decode piece by piece for callbacks even where the caller does not stream.

    Raises:
        ConfigError: An option is unknown or out of range (pydantic's `ValidationError` if it has the wrong type).
        ModelError: The model cannot be loaded.

    Example:
        ```python
        llm = ChatKVMemory(memory, max_tokens=64)
        for chunk in llm.stream("Write a haiku about ferries."):
            print(chunk.text, end="")
        ```
    """

    streaming: bool = False

    def __init__(self, memory: KVMemory, **options: Any) -> None:
        super().__init__(memory, **options)
        memory.load()  # otherwise the first use of the model, which loads it, might block the event loop

    @property
    def model_name(self) -> str:
        """The model's name."""
        return self.memory.backbone.name

    @property
    def _llm_type(self) -> str:
        return "kv-memory"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """The settings that answers depend on. LangChain keys its LLM caches by them."""
        decoding = dataclasses.asdict(self._decode_settings({}))
        decoding["default_stop"] = decoding.pop("stop")  # LangChain uses the name `stop` for the call's own
        return {
            "model_name": self.model_name,
            "fingerprint": self.memory.compressor.fingerprint().digest,
            "store": str(self.memory.path),
            "collection": self.memory.collection,
            "revision": self.memory.store.revision,
            **dataclasses.asdict(self.memory.settings),
            **decoding,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = _PROVIDER
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """The token ids of a text, by the model's own tokenizer."""
        return self.memory.backbone.encode_text(text)

    # -- methods that LangChain calls ----------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        """Reply to messages.

        Raises:
            UnsupportedRequestError: The messages or options contain tools, images or audio.
            CacheNotFoundError: A reference has no cache in the store, and no text came with it.
            FingerprintMismatchError: A cache was made by another model, adapter or prompt.
            ContextWindowError: The caches and messages do not fit the model's context window.
            DecodeTimeoutError: The call took longer than `timeout`.
        """
        return _whole(self._start(messages, stop, kwargs).answer, self.model_name)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        stream = await asyncio.to_thread(self._start, messages, stop, kwargs)
        async with _steps(stream) as pieces:  # token by token, so that a cancelled task stops decoding
            async for _ in pieces:
                pass
        return _whole(stream.answer, self.model_name)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        stream = self._start(messages, stop, kwargs)
        trim = Trim()
        try:
            for piece in stream:
                if text := trim(piece):
                    chunk = _part(text)
                    if run_manager is not None:
                        run_manager.on_llm_new_token(text, chunk=chunk)
                    yield chunk
            yield _last(stream.answer, self.model_name)
        finally:
            stream.close()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        stream = await asyncio.to_thread(self._start, messages, stop, kwargs)
        trim = Trim()
        async with _steps(stream) as pieces:
            async for piece in pieces:
                if text := trim(piece):
                    chunk = _part(text)
                    if run_manager is not None:
                        await run_manager.on_llm_new_token(text, chunk=chunk)
                    yield chunk
        yield _last(stream.answer, self.model_name)

    # -- tools and structured answers ----------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> NoReturn:
        """Refused: the model cannot choose tools.

        Raises:
            UnsupportedRequestError: Always; the message says what to do instead.
        """
        refuse_tools(where="bind_tools")

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: str = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers in a fixed form: only tokens that lead to JSON of the schema are decoded. Needs extra `structured`.

        Args:
            schema: A pydantic class, to return its instances, or a TypedDict or JSON schema, to return dicts.
            include_raw: Return `{"raw": message, "parsed": ..., "parsing_error": ...}` instead, and do not raise if
                the answer was cut off in the middle of its JSON.
            method: `json_schema`; `json_mode` and `function_calling` are synonyms, because the result is the same. No
                tool is called, and the raw message has the JSON as its content.
            strict: Accepted and ignored; output is always strict.
            kwargs: Unknown options; any of them raises `ConfigError`.

        Raises:
            ConfigError: The method, the schema or an option is unknown.
        """
        if kwargs:
            raise ConfigError(f"unknown options {sorted(kwargs)}", where="with_structured_output")
        return structured(self, schema, method=method, include_raw=include_raw)

    # -- the reader ----------------------------------------------------------------------------------------------

    def _start(self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]) -> AnswerStream:
        settings = self._decode_settings({**options, "stop": stop})
        turns, references = turns_of(messages), references_in(options)
        old = recalled(self.memory, messages)
        if references is None and not old:
            return self.memory.reader.reply_alone(turns, settings=settings)
        return self.memory.reader.reply(turns, [*(references or ()), *old], settings=settings)


# -- LangChain's forms of an answer ----------------------------------------------------------------------------------


def _steps(stream: AnswerStream) -> aclosing[AsyncGenerator[str, None]]:
    """The pieces of a stream, each decoded in a thread; closed on exit, not when garbage is collected."""
    return aclosing(cast("AsyncGenerator[str, None]", iterate_in_thread(stream)))


def _whole(reply: Answer, model_name: str) -> ChatResult:
    """A whole answer."""
    message = AIMessage(
        content=reply.text.strip(), usage_metadata=_usage(reply), response_metadata=_metadata(reply, model_name)
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def _part(text: str) -> ChatGenerationChunk:
    """A piece of an answer."""
    return ChatGenerationChunk(message=AIMessageChunk(content=text))


def _last(reply: Answer, model_name: str) -> ChatGenerationChunk:
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
        "model_provider": _PROVIDER,
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
