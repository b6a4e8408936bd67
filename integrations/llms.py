"""What the LLM classes of all frameworks share: their options, opening a store, messages and answers."""

from __future__ import annotations

import asyncio
import difflib
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, closing
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field

from kv_memory import ConfigError, DecodeSettings, KVMemory, UnsupportedRequestError
from kv_memory.config import check_names
from kv_memory.generate import Answer, AnswerStream, Role, iterate_in_thread
from kv_memory.settings import MemorySettings

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
}
_OF_MEMORY = {"settings", *(KVMemory.open.__kwdefaults__ or ()), *MemorySettings.__dataclass_fields__}
_OF_HOSTED = {"api_key", "base_url", "max_retries"}  # frameworks pass them to every LLM; a local model needs none
_OF_DECODING = DecodeSettings.__dataclass_fields__.keys()
_SYNONYMS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "num_output": "max_new_tokens",
    "timeout": "timeout_s",
}
_log = logging.getLogger(__name__)
_TOOLS = {"tools", "tool_choice", "functions", "function_call", "tool_required"}


class MemoryLLM(BaseModel):
    """An LLM over the model of a `KVMemory`; a framework's class inherits from this one first.

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
        UnsupportedRequestError: The messages or options of a call contain tools, images or audio. The reasoning of
            other models is left out of the prompt, and logged.
        CacheNotFoundError: A reference has no cache in the store, and no text came with it.
        FingerprintMismatchError: A cache was made by another model, adapter or prompt.
        ContextWindowError: The caches and messages do not fit the model's context window.
        DecodeTimeoutError: A call took longer than `timeout`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    memory: KVMemory = Field(exclude=True, repr=False)
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list[str] | None = None
    timeout: float | None = None

    def __init__(self, memory: KVMemory, **options: Any) -> None:
        if not isinstance(memory, KVMemory):
            raise ConfigError(
                f"{type(self).__name__} needs a KVMemory, got {type(memory).__name__}",
                where="memory",
                next_step="Pass KVMemory.open(FOLDER).",
            )
        own = type(self).model_fields
        check_names(options, own.keys() | _OF_HOSTED)
        super().__init__(**{name: value for name, value in options.items() if name in own}, memory=memory)
        self._decode_settings({})

    @classmethod
    def open(cls, path: str | Path, **options: Any) -> Self:
        """An LLM over a store that is opened or created; `memory.close()` when done.

        Args:
            path: The store's folder.
            options: Options of this class, and all options of `KVMemory.open` (`model`, `keep_ratio`, `device`,
                `collection`, ...).

        Raises:
            ConfigError: An option is unknown (the error names the nearest one) or out of range.
            ModelError: The model cannot be loaded.
            StoreError: The store cannot be opened.
        """
        own = (cls.model_fields.keys() | _OF_HOSTED) - {"memory"}
        check_names(options, own | _OF_MEMORY)
        memory = KVMemory.open(path, **{name: value for name, value in options.items() if name not in own})
        try:
            return cls(memory, **{name: value for name, value in options.items() if name in own})
        except BaseException:
            memory.close()
            raise

    def _decode_settings(self, options: Mapping[str, Any]) -> DecodeSettings:
        """Settings of a call: the class's own, changed by the call's options.

        Options that are None, and options that frameworks add of their own, are ignored; misspelt ones are refused.
        """
        if asked := sorted(name for name in _TOOLS if options.get(name)):
            refuse_tools(where=", ".join(asked))
        own = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "seed", "timeout")}
        values: dict[str, Any] = {"stop": self.stop or ()}
        for name, value in [*own.items(), *options.items()]:
            field = _SYNONYMS.get(name, name)
            if field not in _OF_DECODING:
                if difflib.get_close_matches(name, _OF_DECODING | _SYNONYMS.keys(), cutoff=0.85):
                    check_names([name], _OF_DECODING | _SYNONYMS.keys())
            elif value is not None:
                values[field] = value
        stop = values["stop"]
        return DecodeSettings(**{**values, "stop": (stop,) if isinstance(stop, str) else tuple(stop)})


def refuse_tools(*, where: str) -> NoReturn:
    """Refuse tools in the options or messages of a call, with an `UnsupportedRequestError`."""
    raise UnsupportedRequestError(
        "this model cannot call tools or use their results",
        where=where,
        next_step="Give the query engine or chain itself to an agent as a tool, driven by a model that can call "
        "tools; for answers in a fixed format use structured output.",
    )


def refuse_content(kind: str, *, where: str) -> NoReturn:
    """Refuse a block of a message that is not text, with an `UnsupportedRequestError`."""
    raise UnsupportedRequestError(
        "this model accepts text only",
        where=f"{kind} in a message of {where}",
        next_step="Put a description of it into the message instead.",
    )


def readable(text: str) -> str:
    """A text with NUL replaced by U+FFFD and half surrogate pairs (half an emoji) by `?`.

    No tokenizer takes them, so a history that holds one would fail with every later question.
    """
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


REASONING = frozenset({"reasoning", "reasoning_content", "thinking", "redacted_thinking", "thought"})


@cache
def log_left_out(kind: str) -> None:
    """Log that reasoning is left out of prompts: once in a process for each kind, since histories come again."""
    _log.warning(
        "the reasoning of another model in a chat history (%s) is left out of the prompt; this is logged once", kind
    )


class Trim:
    """Strips white space around a streamed answer; trailing white space is held back until more text follows."""

    def __init__(self) -> None:
        self._held: str | None = None  # None before the first text

    def __call__(self, piece: str) -> str:
        """The text that can be emitted after this piece."""
        whole = piece.lstrip() if self._held is None else self._held + piece
        text = whole.rstrip()
        if text or self._held is not None:
            self._held = whole[len(text) :]
        return text


def trimmed(stream: AnswerStream) -> Iterator[str]:
    """The pieces of an answer, without white space around it; the stream is closed at the end."""
    with closing(stream):
        yield from filter(None, map(Trim(), stream))


async def trimmed_in_thread(stream: AnswerStream) -> AsyncGenerator[str, None]:
    """`trimmed`, with every token decoded in a thread."""
    trim = Trim()
    async with aclosing(iterate_in_thread(stream)) as pieces:
        async for piece in pieces:
            if text := trim(piece):
                yield text


async def answer_in_thread(start: Callable[..., AnswerStream], *arguments: Any) -> Answer:
    """The whole answer of a started stream, decoded token by token, so that a cancelled task stops decoding."""
    stream = await asyncio.to_thread(start, *arguments)
    async with aclosing(iterate_in_thread(stream)) as pieces:
        async for _ in pieces:
            pass
    return stream.answer


def reply_details(reply: Answer) -> dict[str, Any]:
    """The fields of a reply that a response of any framework reports: times in seconds, and a hint if it is empty."""
    details = {"finish_reason": reply.finish_reason, "ttft_s": reply.ttft_s, "total_s": reply.total_s}
    return details if reply.next_step is None else {**details, "next_step": reply.next_step}


_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # their keys are names, not schema keywords
_VALUES = {"default", "const", "enum", "examples"}


def closed(node: Any) -> Any:
    """A copy of a JSON schema with `additionalProperties: false` on objects that do not set `additionalProperties`.

    JSON schema allows additional properties by default, and a small model that is allowed to keeps adding some.
    """
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    found: dict[str, Any] = {}
    for word, value in node.items():
        if word in _NAMED and isinstance(value, dict):
            found[word] = {name: closed(item) for name, item in value.items()}
        else:  # not inside an allOf of several parts: each names only some of the properties of one object
            found[word] = value if word in _VALUES or (word == "allOf" and len(value) > 1) else closed(value)
    if "properties" in found:
        found.setdefault("additionalProperties", False)
    return found
