"""From distilled caches to answers: compose, prefill the question, decode."""

from kv_memory.generate.answer import Answer, AnswerStream, ReadFrom, iterate_in_thread
from kv_memory.generate.compose import compose
from kv_memory.generate.generator import Generator
from kv_memory.generate.ranked import add_bias, place_ranked
from kv_memory.generate.request import Request
from kv_memory.generate.scheduler import Scheduler
from kv_memory.generate.turns import Prompt, Role, Turn, encode_chat, encode_text_prompt, encode_turns

__all__ = [
    "Answer",
    "AnswerStream",
    "Generator",
    "Prompt",
    "ReadFrom",
    "Request",
    "Role",
    "Scheduler",
    "Turn",
    "add_bias",
    "compose",
    "encode_chat",
    "encode_text_prompt",
    "encode_turns",
    "iterate_in_thread",
    "place_ranked",
]
