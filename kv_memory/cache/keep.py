"""Keep: the amount of a passage to keep, as a share of its tokens, a number of tokens, or a file size.

Caches are compressed, stored and found by their text, their fingerprint and a keep_ratio. `Keep.ratio_for` converts a
budget of tokens or a size limit to a keep_ratio. The result depends only on the fingerprint and the length of the text:
a document that is added again is found unchanged, and a question finds its caches without the text.

This module does not import torch, so that a job's driver and listing a store stay fast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.config import StorageName, check_keep_ratio, n_kept_for, stored_dtype
from kv_memory.errors import ConfigError

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_TENSORS = ("bias", "counts", "key_scales", "keys", "positions", "value_scales", "values")
_WINDOW = re.compile(r"\bwindow:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Keep:
    """The amount of a passage to keep: exactly one of a share, a number of tokens and a size.

    Attributes:
        keep_ratio: Share of the tokens, in (0, 1].
        keep_tokens: Number of entries in every layer and head, on average if heads share a budget. A shorter passage is
            kept whole.
        max_bytes: Maximum size of the cache's file in bytes. A passage that fits is kept whole.
        storage: Dtype of keys and values in the file, which determines how many entries fit into `max_bytes`.

    Raises:
        ConfigError: Not exactly one of the three is given, or it is out of range.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None
    max_bytes: int | None = None
    storage: StorageName = "auto"

    def __post_init__(self) -> None:
        given = [name for name in ("keep_ratio", "keep_tokens", "max_bytes") if getattr(self, name) is not None]
        if len(given) != 1:
            what = (
                f"{' and '.join(given)} exclude each other"
                if given
                else "no keep_ratio, keep_tokens or max_bytes was given"
            )
            step = "Pass one of keep_ratio, keep_tokens and max_bytes."
            raise ConfigError(what, where=given[-1] if given else "keep_ratio", next_step=step)
        if self.keep_ratio is not None:
            check_keep_ratio(self.keep_ratio)
            return
        value = getattr(self, given[0])
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            example = "64" if given[0] == "keep_tokens" else "300_000"
            raise ConfigError(
                f"{given[0]} must be a whole number above 0, got {value!r}",
                where=given[0],
                next_step=f"Pass for example {given[0]}={example}.",
            )

    def __str__(self) -> str:
        if self.keep_tokens is not None:
            return f"{self.keep_tokens:,} tokens per passage"
        return f"keep ratio {self.keep_ratio:g}" if self.keep_ratio else f"at most {self.max_bytes:,} bytes per passage"

    def ratio_for(self, n_tokens: int, fingerprint: Fingerprint, *, n_held: Sequence[int] = ()) -> float:
        """The keep_ratio at which a document's cache is within the budget.

        Args:
            n_tokens: Length of the document in tokens, wrappers included.
            fingerprint: Fingerprint of the document's cache.
            n_held: Number of tokens held out of compression in each window; they count towards the budget. Empty if
                no token is held out.

        Raises:
            ConfigError: The budget is smaller than the smallest cache of the document; the message names the smallest
                budget that works.
        """
        if self.keep_ratio is not None:
            return float(self.keep_ratio)
        # 1. Free tokens of each window: those that are not held out of compression.
        windows = windows_of(n_tokens, _window_tokens(fingerprint) or n_tokens)
        held = n_held or [0] * len(windows)
        free = [end - start - n for (start, end), n in zip(windows, held, strict=True)]
        # 2. Compare the entries that the budget holds with the fewest possible ones.
        least = sum(held) + sum(n > 0 for n in free)  # every window keeps at least one free token
        most = self.keep_tokens
        if most is None:
            assert self.max_bytes is not None
            room = self.max_bytes - _fixed_bytes(fingerprint, self.storage)
            most = room // _entry_bytes(n_tokens, fingerprint, self.storage)
        if most < least:
            self._raise_too_small(n_tokens, fingerprint, least)
        n_free = sum(free)
        # 3. The largest ratio that fits. Each window rounds separately, so it may be a little below the budget's share.
        for n in range(min(most - sum(held), n_free), 0, -1):
            if sum(n_kept_for(length, n / n_free) for length in free) <= most - sum(held):
                return n / n_free
        return 1.0  # all tokens are held out

    def size_bytes(self, n_tokens: int, fingerprint: Fingerprint) -> int:
        """Estimated size of a document's cache file in bytes, at most 3 kB too high; errors of `ratio_for`."""
        ratio = self.ratio_for(n_tokens, fingerprint)
        windows = windows_of(n_tokens, _window_tokens(fingerprint) or n_tokens)
        n_kept = sum(n_kept_for(end - start, ratio) for start, end in windows)
        return n_kept * _entry_bytes(n_tokens, fingerprint, self.storage) + _fixed_bytes(fingerprint, self.storage)

    def fits(self, keep_ratio: float, n_tokens: int, fingerprint: Fingerprint) -> bool:
        """Whether this keep_ratio is exactly the one for a document of `n_tokens`; False if the budget is too small."""
        try:
            return keep_ratio == self.ratio_for(n_tokens, fingerprint)
        except ConfigError:
            return False

    def _raise_too_small(self, n_tokens: int, fingerprint: Fingerprint, least: int) -> None:
        if self.keep_tokens is not None:
            raise ConfigError(
                f"keep_tokens {self.keep_tokens:,} is too small for a document of {n_tokens:,} tokens, whose cache has "
                f"at least {least:,} entries in every layer and head",
                where="keep_tokens",
                next_step=f"Pass {least} or more.",
            )
        entries = least * _entry_bytes(n_tokens, fingerprint, self.storage)
        smallest = entries + _fixed_bytes(fingerprint, self.storage)
        raise ConfigError(
            f"max_bytes {self.max_bytes:,} is too small for a cache of {least:,} "
            f"entr{'y' if least == 1 else 'ies'} in every layer and head, which takes up to {smallest:,} bytes",
            where="max_bytes",
            next_step=f"Pass {smallest} or more.",
        )


def windows_of(n_tokens: int, window: int) -> list[tuple[int, int]]:
    """Cut `n_tokens` into the fewest windows, of nearly equal length: a short last window would lack context."""
    n_windows = -(-n_tokens // window)
    edges = [round(i * n_tokens / n_windows) for i in range(n_windows + 1)]
    return list(pairwise(edges))


def _window_tokens(fingerprint: Fingerprint) -> int | None:
    """Maximum number of tokens prefilled at once; `Compressor.fingerprint` records it in the method. None if absent."""
    found = _WINDOW.search(fingerprint.method)
    return None if found is None else int(found[1])


def _entry_bytes(n_tokens: int, fingerprint: Fingerprint, storage: StorageName) -> int:
    """Size of one entry in every layer and head, in bytes."""
    stored = stored_dtype(storage, fingerprint.dtype)
    position = 2 if n_tokens < 2**15 else 4
    bias = 2 if fingerprint.format_version > 1 else 0
    value_scale = 2 if stored == "int8" else 0
    each = 2 * fingerprint.head_dim * _ITEM_BYTES[stored] + position + bias + value_scale
    return each * fingerprint.num_layers * fingerprint.num_kv_heads


@lru_cache(maxsize=64)  # called for every text of a store
def _fixed_bytes(fingerprint: Fingerprint, storage: StorageName) -> int:
    """Maximum size of a file without its entries, in bytes: counts, scales of the keys, and the header.

    The header is assumed to name every tensor and to have the longest numbers, because the size must be known before
    the cache exists.
    """
    stored = stored_dtype(storage, fingerprint.dtype)
    per_head = 4 + (2 * fingerprint.head_dim if stored == "int8" else 0)
    number, digest = 1.2345678901234567e-300, "0" * 64
    inner = {
        "n_tokens": 10**9,
        "keep_ratio": number,
        "fingerprint": asdict(replace(fingerprint, keep_spans=digest)),
        "refined_steps": 10**6,
        "fidelity": number,
        "storage": stored,
        "text_sha256": digest,
    }
    tensor = {"dtype": "BF16", "shape": [10**9] * 4, "data_offsets": [10**10] * 2}
    header = {"__metadata__": {"kv_memory": json.dumps(inner)}, **dict.fromkeys(_TENSORS, tensor)}
    # 8 bytes for the length, and up to 7 of padding to a multiple of 8.
    n_header = 15 + len(json.dumps(header, separators=(",", ":")))
    return n_header + per_head * fingerprint.num_layers * fingerprint.num_kv_heads
