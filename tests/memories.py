"""A small store of documents about small things, for the tests of the facade."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kv_memory import DecodeSettings, KVMemory
from tests.conftest import make_backbone

SETTINGS = DecodeSettings(max_new_tokens=4)
FERRY = "The ferry to Skarholm leaves at 7.40 from pier 4 every morning."
LAMP = "The lighthouse lamp burned whale oil until an office acted."
LONG = " ".join(f"Paragraph {i} tells of the {word} and nothing else." for i, word in enumerate(
    ["walrus", "kettle", "violin", "comet", "turnip", "anvil", "glacier", "parsnip"]
))  # fmt: skip
FERRY_QUESTION = "When does the ferry leave?"
LAMP_QUESTION = "What did the lamp burn?"


def wide_backbone(name: str = "llama", **changes: Any) -> Any:
    """A tiny model with room for several passages."""
    return make_backbone(name, max_position_embeddings=4096, **changes)


def open_memory(path: Path, backbone: Any, **options: Any) -> KVMemory:
    """A store in the folder, with passages of 64 tokens; the selector asks one forward pass a passage."""
    return KVMemory.open(path, model=backbone, **{"selector": "attention", "passage_tokens": 64, **options})


def answerable(memory: KVMemory, *questions: str) -> list[str]:
    """The answers, each from a stored cache."""
    answers = [memory.ask(question, top_k=1, settings=SETTINGS) for question in questions]
    assert all(answer.sources and not answer.fallbacks and answer.n_cached_tokens > 11 for answer in answers)
    return [answer.sources[0].document_id for answer in answers]
