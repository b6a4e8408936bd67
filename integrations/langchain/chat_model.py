"""ChatKVMemory: the memory's model as a LangChain chat model that answers from distilled caches when given any."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, NoReturn

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool

from kv_memory import ConfigError, KVMemory
from kv_memory.generate import Answer, AnswerStream

from ..llms import MemoryLLM, answer_in_thread, readable, refuse_tools, reply_details, trimmed, trimmed_in_thread
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
        memory: An open memory. Its model is loaded now, unless it already is. `MemoryLLM` describes the other options,
            and the errors of a call.
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
        return self.memory.backbone.encode_text(readable(text))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._result(self._start(messages, stop, kwargs).answer)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._result(await answer_in_thread(self._start, messages, stop, kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        stream = self._start(messages, stop, kwargs)
        for text in trimmed(stream):
            yield ChatGenerationChunk(message=AIMessageChunk(content=text))
        yield self._last(stream.answer)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        stream = await asyncio.to_thread(self._start, messages, stop, kwargs)
        async with aclosing(trimmed_in_thread(stream)) as texts:  # not closed when garbage is collected
            async for text in texts:
                yield ChatGenerationChunk(message=AIMessageChunk(content=text))
        yield self._last(stream.answer)

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

    def _start(self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]) -> AnswerStream:
        settings = self._decode_settings({**options, "stop": stop})
        turns, references = turns_of(messages), references_in(options)
        old = recalled(self.memory, messages)
        if references is None and not old:
            return self.memory.reader.reply_alone(turns, settings=settings)
        return self.memory.reader.reply(turns, [*(references or ()), *old], settings=settings)

    def _result(self, reply: Answer) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(reply.text.strip(), **self._costs(reply)))])

    def _last(self, reply: Answer) -> ChatGenerationChunk:
        """The usage and metadata, after the last piece: LangChain adds chunks up, so only one may carry them."""
        return ChatGenerationChunk(message=AIMessageChunk(content="", **self._costs(reply), chunk_position="last"))

    def _costs(self, reply: Answer) -> dict[str, Any]:
        n_input = reply.n_prompt_tokens + reply.n_cached_tokens
        usage = UsageMetadata(
            input_tokens=n_input,
            output_tokens=reply.n_new_tokens,
            total_tokens=n_input + reply.n_new_tokens,
            input_token_details=InputTokenDetails(cache_read=reply.n_cached_tokens),
        )
        metadata = {"model_name": self.model_name, "model_provider": _PROVIDER, **reply_details(reply)}
        return {"usage_metadata": usage, "response_metadata": metadata}
