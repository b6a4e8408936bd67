"""DistilledCache: what is left of a document after compression.

The file format is one safetensors file with three tensors and a JSON header:

- `keys`, `values`: `(num_layers, num_kv_heads, n_kept, head_dim)`, keys without rotary embedding;
- `positions`: `(num_layers, num_kv_heads, n_kept)`, or `(n_kept,)` where all heads share one row.

Layers are stacked into one tensor rather than stored one by one: the header stays at a few hundred bytes, so a cache
costs what its tensors cost, and one contiguous read fills it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from kv_memory.errors import ConfigError, CorruptCacheError
from kv_memory.fingerprint import Fingerprint

__all__ = ["DistilledCache", "dtype_from_name", "dtype_name"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_from_name(name: str) -> torch.dtype:
    """The torch dtype of a stored name: `float32`, `bfloat16` or `float16`.

    Raises:
        ConfigError: The name is none of these.
    """
    try:
        return _DTYPES[name]
    except KeyError:
        raise ConfigError(
            f"unknown dtype {name!r}", where="dtype", next_step=f"Use one of {', '.join(_DTYPES)}."
        ) from None


def dtype_name(dtype: torch.dtype) -> str:
    """The stored name of a torch dtype, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class DistilledCache:
    """Keys and values of the kept tokens of one document, free of positions.

    Attributes:
        keys: `(num_layers, num_kv_heads, n_kept, head_dim)`, without rotary embedding.
        values: `(num_layers, num_kv_heads, n_kept, head_dim)`.
        positions: The kept tokens' positions inside the document, ascending: `(num_layers, num_kv_heads, n_kept)`,
            or `(n_kept,)` where all layers and heads keep the same tokens. Integer.
        n_tokens: Length of the whole document, in tokens.
        keep_ratio: What was asked for, in (0, 1].
        fingerprint: What made it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    n_tokens: int
    keep_ratio: float
    fingerprint: Fingerprint

    def __post_init__(self) -> None:
        print_ = self.fingerprint
        if self.keys.ndim != 4:
            raise ConfigError(f"keys must have 4 dimensions, got shape {tuple(self.keys.shape)}", where="keys")
        shape = (print_.num_layers, print_.num_kv_heads, self.keys.shape[2], print_.head_dim)
        for name in ("keys", "values"):
            tensor: torch.Tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or dtype_name(tensor.dtype) != print_.dtype:
                raise ConfigError(
                    f"{name} must be {shape} of {print_.dtype}, "
                    f"got {tuple(tensor.shape)} of {dtype_name(tensor.dtype)}",
                    where=name,
                )
        if tuple(self.positions.shape) not in {shape[:3], shape[2:3]} or self.positions.is_floating_point():
            raise ConfigError(
                f"positions must be integers of shape {shape[:3]} or {shape[2:3]}, got {tuple(self.positions.shape)}",
                where="positions",
            )
        if not 0 < self.n_kept <= self.n_tokens or not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"{self.n_kept} of {self.n_tokens} tokens kept at keep_ratio {self.keep_ratio}")

    @property
    def n_kept(self) -> int:
        """Entries kept in every layer and head."""
        return self.keys.shape[2]

    @property
    def per_head(self) -> bool:
        """Whether layers and heads keep different tokens."""
        return self.positions.ndim == 3

    @property
    def size_bytes(self) -> int:
        """Bytes of the three tensors, without the file's header."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.positions))

    @property
    def theory_bytes(self) -> int:
        """Bytes of the kept keys and values alone: `2 * layers * heads * n_kept * head_dim * itemsize`."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def to(self, dtype: torch.dtype) -> DistilledCache:
        """The same cache with keys and values in another floating point type."""
        if dtype == self.keys.dtype:
            return self
        return replace(
            self,
            keys=self.keys.to(dtype),
            values=self.values.to(dtype),
            fingerprint=replace(self.fingerprint, dtype=dtype_name(dtype)),
        )

    def to_bytes(self) -> bytes:
        """The cache as one safetensors file. The same cache always gives the same bytes."""
        # int16 holds every position of a document under 32,768 tokens: per-head positions then cost 0.8 % of the
        # bfloat16 keys and values at head_dim 64; int32 would cost 1.6 %.
        narrow = torch.int16 if self.n_tokens <= torch.iinfo(torch.int16).max else torch.int32
        tensors = {
            "keys": self.keys.cpu().contiguous(),
            "values": self.values.cpu().contiguous(),
            "positions": self.positions.to(narrow).cpu().contiguous(),
        }
        # One entry, because safetensors writes several in an order that changes from run to run.
        header = {"n_tokens": self.n_tokens, "keep_ratio": self.keep_ratio, "fingerprint": asdict(self.fingerprint)}
        return safetensors.torch.save(tensors, metadata={"kv_memory": json.dumps(header, sort_keys=True)})

    def save(self, path: Path | str) -> None:
        """Write the cache as a safetensors file."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path | str, *, device: str = "cpu") -> DistilledCache:
        """Read a safetensors file; on the CPU its tensors are views of the mapped file, not copies.

        Raises:
            CorruptCacheError: The file is not a distilled cache or its tensors do not match its header.
            FingerprintMismatchError: The file has another format version.
        """
        where = str(path)
        try:
            with safe_open(where, framework="pt", device=device) as file:
                metadata = file.metadata() or {}
                header = json.loads(metadata["kv_memory"])
                fingerprint = Fingerprint.from_json(json.dumps(header["fingerprint"]))
                return cls(
                    keys=file.get_tensor("keys"),
                    values=file.get_tensor("values"),
                    positions=file.get_tensor("positions"),
                    n_tokens=header["n_tokens"],
                    keep_ratio=header["keep_ratio"],
                    fingerprint=fingerprint,
                )
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise CorruptCacheError(
                f"not a readable distilled cache: {error}",
                where=where,
                next_step="Compress the document again (`kv-memory add --stale`).",
            ) from error
