"""An encoder for tests: a text is the concepts that its words stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONCEPTS = [
    ("ferry", "boat", "vessel"),
    ("ticket", "fare", "price"),
    ("house", "building", "roof"),
    ("library", "book", "volume"),
]


class Concepts:
    """Counts how many texts it was given."""

    def __init__(self, name: str = "concepts") -> None:
        self.name = name
        self.texts: list[str] = []

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        return np.array(
            [[0.01, *(float(any(word in text.lower() for word in words)) for words in CONCEPTS)] for text in texts]
        )
