"""A question, and what is compared of its answer, for the tests of `Reader`."""

from __future__ import annotations

from typing import Any

from kv_memory import DecodeSettings
from kv_memory.generate import Answer, Turn
from kv_memory.query import Reference, key_of
from tests.memories import FERRY_QUESTION

ASKED = [Turn("user", FERRY_QUESTION)]
SAMPLED = DecodeSettings(max_new_tokens=40, temperature=1.0, seed=7)
WALRUS = "The walrus sleeps on the ice all day."


def reference(text: str, /, **changes: Any) -> Reference:
    return Reference(key=key_of(text), **changes)


def of(reply: Answer) -> tuple[Any, ...]:
    """A reply without its times."""
    return (
        reply.text,
        reply.finish_reason,
        reply.n_prompt_tokens,
        reply.n_cached_tokens,
        reply.n_new_tokens,
        reply.damaged,
    )
