"""Training and evaluation sets: documents with questions and human answers."""

from __future__ import annotations

from kv_memory.datasets.example import Example, Question
from kv_memory.datasets.read import DATASETS, Split, read_examples
from kv_memory.datasets.split import corpus_split, sample, split_by_hash

__all__ = ["DATASETS", "Example", "Question", "Split", "corpus_split", "read_examples", "sample", "split_by_hash"]
