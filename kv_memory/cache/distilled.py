"""DistilledCache: the key-value cache of a compressed document.

The file format is one safetensors file with three tensors and a JSON header:

- `keys`, `values`: `(num_layers, num_kv_heads, n_kept, head_dim)`, keys without rotary embedding;
- `positions`: `(num_layers, num_kv_heads, n_kept)`, or `(n_kept,)` if all heads share one row.

If heads keep different numbers of entries, the entries are concatenated, layer by layer and head by head:

- `keys`, `values`: `(n_entries, head_dim)`; `positions`: `(n_entries,)`;
- `counts`: `(num_layers, num_kv_heads)`, number of entries of each head.

Keys and values may be stored in another dtype than the fingerprint's; the header then has `storage`, and reading
converts them back. As int8 they come with two tensors of scales, see `quantize`. Files of format 2 may hold one more
tensor, `bias`, float16: one number per entry, added to its attention logit. The header of a cache from a store has the
hash of its text, so that it cannot be mistaken for the cache of another text.

Layers are stacked into one tensor, not stored separately: the header stays at a few hundred bytes, so a cache is as
large as its tensors, and one contiguous read loads it.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.cache.quantize import dequantize, quantize
from kv_memory.config import StorageName, stored_dtype
from kv_memory.errors import ConfigError, CorruptCacheError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_from_name(name: str) -> torch.dtype:
    """The torch dtype of a recorded name: `float32`, `bfloat16` or `float16`.

    Raises:
        ConfigError: The name is not one of these.
    """
    try:
        return _DTYPES[name]
    except KeyError:
        raise ConfigError(
            f"unknown dtype {name!r}", where="dtype", next_step=f"Use one of {', '.join(_DTYPES)}."
        ) from None


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which a torch dtype is recorded, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class DistilledCache:
    """Keys and values of the kept tokens of one document, independent of their positions.

    Attributes:
        keys: `(num_layers, num_kv_heads, n_kept, head_dim)`, without rotary embedding.
        values: `(num_layers, num_kv_heads, n_kept, head_dim)`.
        positions: Positions of the kept tokens inside the document, ascending, integer:
            `(num_layers, num_kv_heads, n_kept)`, or `(n_kept,)` if all layers and heads keep the same tokens.
        n_tokens: Length of the whole document, in tokens.
        keep_ratio: Requested keep ratio, in (0, 1].
        fingerprint: Fingerprint of the model and the method that made the cache.
        bias: Float16, in the shape of `keys` without head_dim, added to each entry's attention logit; None for no
            bias. Needs format 2.
        counts: Integer `(num_layers, num_kv_heads)`, number of entries of each head, if heads keep different numbers;
            None otherwise. With counts, `keys` and `values` are `(n_entries, head_dim)` and `positions` is
            `(n_entries,)`, layer by layer and head by head.
        refined_steps: Number of gradient steps of refinement; 0 if the cache was not refined, or if no step helped.
        fidelity: KL to the full cache on held-out probes, in nats, lower is better; None if not measured.
        text_sha256: SHA-256 hex digest of the text, set by the store; None outside a store, and in the oldest files.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    n_tokens: int
    keep_ratio: float
    fingerprint: Fingerprint
    counts: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    refined_steps: int = 0
    fidelity: float | None = None
    text_sha256: str | None = None

    def __post_init__(self) -> None:
        print_, heads = self.fingerprint, (self.fingerprint.num_layers, self.fingerprint.num_kv_heads)
        if self.refined_steps < 0 or (self.fidelity is not None and not 0 <= self.fidelity < math.inf):
            raise ConfigError(
                f"invalid fidelity {self.fidelity} after {self.refined_steps} refinement steps", where="fidelity"
            )
        if not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"keep_ratio must lie in (0, 1], got {self.keep_ratio}", where="keep_ratio")
        # 1. Shape of the entries: (n_entries,) with counts, else (num_layers, num_kv_heads, n_kept).
        shape: tuple[int, ...]
        if (counts := self.counts) is not None:
            if tuple(counts.shape) != heads or counts.is_floating_point():
                raise ConfigError(
                    f"counts must be integers of shape {heads}, got {tuple(counts.shape)}", where="counts"
                )
            if int(counts.min()) < 0 or int(counts.max()) > self.n_tokens or int(counts.max()) == 0:
                raise ConfigError(f"counts must be in the range 0 to {self.n_tokens} and not all be 0", where="counts")
            shape = (int(counts.sum()),)
        elif self.keys.ndim != 4:
            raise ConfigError(f"keys must have 4 dimensions, got shape {tuple(self.keys.shape)}", where="keys")
        else:
            shape = (*heads, self.keys.shape[2])
            if not 0 < self.n_kept <= self.n_tokens:
                raise ConfigError(f"cannot keep {self.n_kept} of {self.n_tokens} tokens", where="keys")
        # 2. Tensors of this shape.
        for name in ("keys", "values"):
            tensor: torch.Tensor = getattr(self, name)
            if tuple(tensor.shape) != (*shape, print_.head_dim) or dtype_name(tensor.dtype) != print_.dtype:
                raise ConfigError(
                    f"{name} must be {(*shape, print_.head_dim)} of {print_.dtype}, "
                    f"got {tuple(tensor.shape)} of {dtype_name(tensor.dtype)}",
                    where=name,
                )
        if tuple(self.positions.shape) not in {shape, shape[-1:]} or self.positions.is_floating_point():
            raise ConfigError(
                f"positions must be integers of shape {' or '.join(map(str, dict.fromkeys((shape, shape[-1:]))))}, "
                f"got {tuple(self.positions.shape)}",
                where="positions",
            )
        if self.bias is not None:
            self._check_bias(self.bias)

    def _check_bias(self, bias: torch.Tensor) -> None:
        if self.fingerprint.format_version < 2:
            raise ConfigError("a cache of format 1 has no biases", where="bias")
        if bias.shape != self.keys.shape[:-1] or bias.dtype != torch.float16:
            raise ConfigError(
                f"bias must be {tuple(self.keys.shape[:-1])} of float16, "
                f"got {tuple(bias.shape)} of {dtype_name(bias.dtype)}",
                where="bias",
            )
        if not bias.isfinite().all():
            raise ConfigError("biases must be finite numbers", where="bias")

    @property
    def n_kept(self) -> int:
        """Number of entries kept per layer and head; the rounded average if heads keep different numbers."""
        if self.counts is not None:
            return max(1, round(self.keys.shape[0] / self.counts.numel()))
        return self.keys.shape[2]

    @property
    def span(self) -> int:
        """Number of consecutive positions that the entries need: the number of entries of the fullest head."""
        return self.n_kept if self.counts is None else int(self.counts.max())

    @property
    def head_counts(self) -> torch.Tensor:
        """Number of entries of each layer and head, `(num_layers, num_kv_heads)`, int64, on the CPU."""
        return torch.full(self.keys.shape[:2], self.n_kept) if self.counts is None else self.counts.long().cpu()

    @property
    def flat_positions(self) -> torch.Tensor:
        """Positions of all entries, `(n_entries,)`, layer by layer and head by head."""
        return self.positions.expand(self.keys.shape[:-1]).flatten()

    @property
    def per_head(self) -> bool:
        """Whether layers and heads keep different tokens."""
        return self.positions.ndim == 3 or self.counts is not None

    @property
    def size_bytes(self) -> int:
        """Size of the tensors in bytes, without the file's header."""
        tensors = [self.keys, self.values, self.positions, self.counts, self.bias]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def theory_bytes(self) -> int:
        """Size of the kept keys and values alone, in bytes: `2 * entries * head_dim * itemsize`."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def to_bytes(self, *, storage: StorageName = "auto") -> bytes:
        """The cache as one safetensors file. The same cache always gives the same bytes.

        Args:
            storage: Dtype of keys and values in the file; `auto` is their own. `int8` takes half the bytes of
                bfloat16, and rounds, see `kv_memory.cache.quantize`.

        Raises:
            ConfigError: Keys or values hold numbers that this dtype cannot represent.
        """
        stored = stored_dtype(storage, self.fingerprint.dtype)
        # int16 holds every position of a document under 32,768 tokens: per-head positions then cost 0.8 % of the
        # bfloat16 keys and values at head_dim 64; int32 would cost 1.6 %.
        narrow = torch.int16 if self.n_tokens <= torch.iinfo(torch.int16).max else torch.int32
        tensors = {**self._entries(stored), "positions": self.positions.to(narrow)}
        if self.counts is not None:
            tensors["counts"] = self.counts.to(torch.int32)
        if self.bias is not None:
            tensors["bias"] = self.bias
        # A single metadata entry, because safetensors writes several in an order that changes from run to run.
        header = {
            "n_tokens": self.n_tokens,
            "keep_ratio": self.keep_ratio,
            "fingerprint": asdict(self.fingerprint),
            "refined_steps": self.refined_steps,
            "fidelity": self.fidelity,
        }
        if stored != self.fingerprint.dtype:
            header["storage"] = stored
        if self.text_sha256 is not None:
            header["text_sha256"] = self.text_sha256
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        return safetensors.torch.save(tensors, metadata={"kv_memory": json.dumps(header, sort_keys=True)})

    def _entries(self, stored: str) -> dict[str, torch.Tensor]:
        """Keys and values in the dtype of the file; for int8, also their scales."""
        if stored == "int8":
            return quantize(self.keys, self.values, self.counts)
        tensors = {"keys": self.keys, "values": self.values}
        if stored == self.fingerprint.dtype:
            return tensors
        cast = {name: tensor.to(dtype_from_name(stored)) for name, tensor in tensors.items()}
        for name, tensor in cast.items():
            if not tensor.to(self.keys.dtype).isfinite().all():
                raise ConfigError(
                    f"{name} have numbers outside the range of {stored}",
                    where=name,
                    next_step=f"Store the cache as {self.fingerprint.dtype} (storage 'auto').",
                )
        return cast

    def save(self, path: Path | str, *, storage: StorageName = "auto") -> None:
        """Write the cache as a safetensors file; arguments and errors as in `to_bytes`."""
        Path(path).write_bytes(self.to_bytes(storage=storage))

    @classmethod
    def load(cls, path: Path | str, *, device: str = "cpu") -> DistilledCache:
        """Read a safetensors file; on the CPU its tensors are views of the mapped file, not copies.

        Keys and values stored in another dtype than the fingerprint's are converted to it, and are copies.

        Raises:
            FileNotFoundError: The file does not exist.
            CorruptCacheError: The file is not a distilled cache or its tensors do not match its header.
            FingerprintMismatchError: The file has another format version.
        """
        where = str(path)
        try:
            with _opened(where, device) as file:
                metadata = file.metadata() or {}
                header = json.loads(metadata["kv_memory"])
                fingerprint = Fingerprint.from_json(json.dumps(header["fingerprint"]))
                names = set(file.keys())
                counts = file.get_tensor("counts") if "counts" in names else None
                keys, values = _read_entries(file, header.get("storage", fingerprint.dtype), counts, fingerprint)
                return cls(
                    keys=keys,
                    values=values,
                    positions=file.get_tensor("positions"),
                    n_tokens=header["n_tokens"],
                    keep_ratio=header["keep_ratio"],
                    fingerprint=fingerprint,
                    counts=counts,
                    bias=file.get_tensor("bias") if "bias" in names else None,
                    refined_steps=header.get("refined_steps", 0),  # files of the first version lack this and `fidelity`
                    fidelity=header.get("fidelity"),
                    text_sha256=header.get("text_sha256"),
                )
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise CorruptCacheError(
                f"not a readable distilled cache: {error}",
                where=where,
                next_step="Compress the document again (`kv-memory add --stale`).",
            ) from error


def _opened(where: str, device: str) -> Any:
    """`safe_open` with system errors as `OSError`: torch opens the file again, and reports failures only as text."""
    try:
        return safe_open(where, framework="pt", device=device)
    except RuntimeError as error:
        number = re.search(r"\((\d+)\)$", str(error).strip())  # e.g. deleted between the two
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), where) from error


def _read_entries(
    file: Any, stored: str, counts: torch.Tensor | None, fingerprint: Fingerprint
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of an open safetensors file in the fingerprint's dtype.

    Raises:
        ConfigError: Keys or values do not have the recorded dtype, or do not match their scales.
    """
    dtype = dtype_from_name(fingerprint.dtype)
    if stored == "int8":
        names = ("keys", "key_scales", "values", "value_scales")
        return dequantize({name: file.get_tensor(name) for name in names}, counts, dtype)
    keys, values = file.get_tensor("keys"), file.get_tensor("values")
    if not dtype_from_name(stored) == keys.dtype == values.dtype:
        raise ConfigError(f"keys and values must be {stored}, got {dtype_name(keys.dtype)}", where="keys")
    return keys.to(dtype), values.to(dtype)
