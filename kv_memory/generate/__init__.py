"""From distilled caches to answers: compose, prefill the question, decode."""

from kv_memory.generate.compose import compose
from kv_memory.generate.generator import Generation, Generator, Run, first_token_rule, iterate_in_thread
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
    "first_token_rule",
    "iterate_in_thread",
]
