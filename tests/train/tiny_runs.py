"""Small runs on tiny models, for the tests of the trainer."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from kv_memory.datasets import Example, Question
from kv_memory.train.adapters import new_adapter
from kv_memory.train.settings import TrainSettings
from kv_memory.train.trainer import Trainer
from tests.conftest import make_backbone

__all__ = ["SETTINGS", "examples", "make_trainer", "replace", "tensors_of"]

THINGS = ("ferry", "kettle", "violin", "comet", "turnip", "anvil", "glacier", "parsnip", "walrus", "lamp")
# Everything that a test could depend on is written out: defaults change when experiments say so.
SETTINGS = TrainSettings(
    scorer="layer",
    scorer_size=8,
    routed="document",
    budget="head",
    targets=("q", "k", "v", "o"),
    rank=4,
    batch_documents=1,
    accumulate=1,
    min_ratio=0.03,
    max_ratio=0.6,
    answers="people",
    question_weight=0.3,
    spans_per_document=1,
    warmup_weight=0.0,
    warmup_steps=3,
    steps=5,
    max_tokens=64,
    questions_per_document=2,
    span_tokens=12,
    answer_tokens=6,
    composition_share=0.3,
    lr_lora=5e-3,
    lr_scorer=1e-2,
    lr_scorer_distil=1e-3,
)


def examples(n: int = 6) -> list[Example]:
    """Documents of about 50 bytes with two questions each."""
    found = []
    for number in range(n):
        thing = THINGS[number % len(THINGS)]
        context = f"The {thing} stands in room {number} and weighs {3 * number + 1} kilos."
        questions = (
            Question(text=f"Where is the {thing}?", answers=(f"room {number}",)),
            Question(text="How heavy is it?", answers=(f"{3 * number + 1} kilos",)),
        )
        found.append(Example(id=f"tiny/{number}", context=context, questions=questions, source="tiny"))
    return found


def make_trainer(out: Path, *, settings: TrainSettings = SETTINGS, model: str = "llama", **options: Any) -> Trainer:
    """A trainer of a new adapter for a new model; `options` are those of `Trainer`."""
    adapter = new_adapter(make_backbone(model), settings)
    return Trainer(adapter, examples(), settings=settings, out=out, **options)


def tensors_of(folder: Path) -> dict[str, str]:
    """Hashes of the tensor files of an adapter folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
