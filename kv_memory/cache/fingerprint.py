"""Fingerprint: everything that decides whether a cache can be decoded by the model at hand.

Free of torch, so that listing a store stays quick.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from kv_memory.errors import CorruptCacheError, FingerprintMismatchError

__all__ = ["FORMATS", "Fingerprint", "describe_differences"]

# Formats of the cache file, see `distilled`: 2 where entries may have biases, else 1, so that a cache written before
# there were any keeps its fingerprint.
FORMATS = (1, 2)


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides whether a cache can be decoded by the model at hand.

    Two caches with equal fingerprints, text and keep_ratio are interchangeable. Hashes are SHA-256 hex digests.

    Attributes:
        format_version: Of the file format, see this module.
        architecture: The model type, e.g. `llama`.
        weights: Hash of the base model's weights.
        tokenizer: Hash of the tokenizer.
        prompt: Hash of the prompt form: prefix, document wrapper, question wrapper.
        prefix: Hash of the token ids of the shared prefix the document was read behind.
        method: The selector's name and settings, or `adapter`.
        adapter: Hash of the adapter's files; empty without one.
        eta: The layer whose output the scorer reads; None without a scorer.
        rope: Hash of the rotary embedding's configuration.
        dtype: Of the stored keys and values.
        num_layers: Of the model.
        num_kv_heads: Of the model.
        head_dim: Of one key or value.
        keep_spans: Hash of the spans held out of compression; empty without any.
    """

    format_version: int
    architecture: str
    weights: str
    tokenizer: str
    prompt: str
    prefix: str
    method: str
    adapter: str
    eta: int | None
    rope: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    keep_spans: str = ""

    @cached_property  # each look-up in a store asks for it
    def digest(self) -> str:
        """SHA-256 over the canonical JSON of all fields: the name of this fingerprint in the catalog."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no white space."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=64)  # the caches of a store have few, and the same one keeps its digest
    def from_json(text: str) -> Fingerprint:
        """Inverse of `to_json`.

        Raises:
            FingerprintMismatchError: The fields are not those of this version of the format.
        """
        try:
            data = json.loads(text)
            version = data.get("format_version")
            if version not in FORMATS or set(data) != {f.name for f in fields(Fingerprint)}:
                raise FingerprintMismatchError(
                    f"cache has format version {version}, this package reads {' and '.join(map(str, FORMATS))}",
                    next_step="Compress the document again, or use the version that wrote it.",
                )
            return Fingerprint(**data)
        except (json.JSONDecodeError, AttributeError, TypeError) as error:
            raise CorruptCacheError(f"fingerprint is not readable: {error}") from error

    def differences(self, other: Fingerprint) -> dict[str, tuple[Any, Any]]:
        """The fields in which two fingerprints differ: `{name: (this, other)}`."""
        mine, theirs = asdict(self), asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    def check(self, expected: Fingerprint, *, where: str | None = None) -> None:
        """Raise unless this cache fingerprint equals the one the loaded model expects.

        Raises:
            FingerprintMismatchError: Names every differing field with both sides.
        """
        if self == expected:
            return
        raise FingerprintMismatchError(
            f"cache does not belong to what is loaded: {describe_differences(self, expected)}",
            where=where,
            next_step="Run `kv-memory add --stale` to compress its documents again, or open the store with the "
            "model, adapter and prompt that made it.",
        )


def describe_differences(made: Fingerprint, loaded: Fingerprint) -> str:
    """One line a person can read: each differing field with the made and the loaded side."""
    said = []
    for name, sides in made.differences(loaded).items():
        here, there = (str(side) if side not in ("", None) else "none" for side in sides)
        if here[:12] != there[:12]:
            here, there = (side[:12] if len(side) == 64 else side for side in (here, there))
        said.append(f"{name} is {here} in the cache, {there} loaded")
    return "; ".join(said)
