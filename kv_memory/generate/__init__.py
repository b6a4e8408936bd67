"""From distilled caches to answers: compose, prefill the question, decode."""

from kv_memory.generate.compose import compose
from kv_memory.generate.generator import Generation, Generator, Run, iterate_in_thread, opening_behind
from kv_memory.generate.turns import Prompt, Role, Turn, encode_chat, encode_text_prompt, encode_turns

__all__ = [
    "Generation",
    "Generator",
    "Prompt",
    "Role",
    "Run",
    "Turn",
    "compose",
    "encode_chat",
    "encode_text_prompt",
    "encode_turns",
    "iterate_in_thread",
    "opening_behind",
]
