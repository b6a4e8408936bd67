"""From distilled caches to answers: compose, prefill the question, decode."""

from kv_memory.generate.compose import compose
from kv_memory.generate.generator import Generation, Generator, Run, iterate_in_thread

__all__ = ["Generation", "Generator", "Run", "compose", "iterate_in_thread"]
