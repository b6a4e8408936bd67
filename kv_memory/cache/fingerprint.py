"""Fingerprint: everything that decides whether the loaded model can use a cache.

This module does not import torch, so that listing a store stays fast.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache

from kv_memory.errors import CorruptCacheError, FingerprintMismatchError

# Formats of the cache file, see `distilled`: 2 if entries may have biases, else 1, so that caches from before biases
# existed keep their fingerprint.
FORMATS = (1, 2)


@dataclass(frozen=True)
class Fingerprint:
    """Everything that decides whether the loaded model can use a cache.

    Two caches with equal fingerprints, text and keep_ratio are interchangeable. Hashes are SHA-256 hex digests.

    Attributes:
        format_version: Version of the file format, see `FORMATS`.
        architecture: Model type, e.g. `llama`.
        weights: Hash of the base model's weights.
        tokenizer: Hash of the tokenizer.
        prompt: Hash of the prompt form: prefix, document wrapper, question wrapper.
        prefix: Hash of the token ids of the shared prefix before the document.
        method: Name and settings of the selector, or `adapter`.
        adapter: Hash of the adapter's files; empty without one.
        eta: Number of the layer that supplies the scorer's input; None without a scorer.
        rope: Hash of the rotary embedding's configuration.
        dtype: Dtype of keys and values in memory; a file may store another one, see `distilled`.
        num_layers: Number of layers of the model.
        num_kv_heads: Number of KV heads of the model.
        head_dim: Dimension of one key or value.
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

    @cached_property  # every look-up in a store needs it
    def digest(self) -> str:
        """SHA-256 over the canonical JSON of all fields; the catalog's key for this fingerprint."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no white space."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=64)  # a store has few fingerprints, and sharing an instance reuses its digest
    def from_json(text: str) -> Fingerprint:
        """Inverse of `to_json`.

        Raises:
            FingerprintMismatchError: The format version or the set of fields is not supported.
            CorruptCacheError: The text is not a JSON object.
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

    def check(self, expected: Fingerprint, *, where: str | None = None) -> None:
        """Raise unless this cache fingerprint equals the one the loaded model expects.

        Raises:
            FingerprintMismatchError: The fingerprints differ; the message names every differing field with both values.
        """
        if self == expected:
            return
        said = []
        for name, mine in asdict(self).items():
            if mine != (theirs := getattr(expected, name)):
                here, there = (str(side) if side not in ("", None) else "none" for side in (mine, theirs))
                if here[:12] != there[:12]:
                    here, there = (side[:12] if len(side) == 64 else side for side in (here, there))
                said.append(f"{name} is {here} in the cache, {there} loaded")
        raise FingerprintMismatchError(
            f"cache does not match the loaded model and settings: {'; '.join(said)}",
            where=where,
            next_step="Run `kv-memory add --stale` to compress its documents again, or open the store with the "
            "model, adapter and prompt that made it.",
        )
