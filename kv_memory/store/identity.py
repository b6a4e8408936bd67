"""Checks that a blob is the one its row describes: a swapped or tampered row may name another text's sound blob."""

from __future__ import annotations

import json
from pathlib import Path

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.errors import CorruptCacheError
from kv_memory.store.error_mapping import mapped
from kv_memory.store.sql.schema import CacheRow

__all__ = ["MisfiledError", "check_header", "check_identity"]

_MOST_BYTES = 100 * 2**20  # of a header, as in safetensors itself; a longer one is read in part, and fails as JSON


class MisfiledError(CorruptCacheError):
    """A row names the sound blob of something else; never leaves the store, as callers get `CorruptCacheError`."""


def check_identity(row: CacheRow, *, text_sha256: str | None, fingerprint: Fingerprint, keep_ratio: float) -> None:
    """Compare the identity recorded in a blob with its row.

    Args:
        row: Catalog row of the cache.
        text_sha256: Text hash recorded in the blob; None if the blob was not written by a store.
        fingerprint: Fingerprint recorded in the blob.
        keep_ratio: Keep ratio recorded in the blob.

    Raises:
        MisfiledError: Blob and row differ.
    """
    for name, said, wanted in (
        ("text", text_sha256, row.text_sha256),
        ("fingerprint", fingerprint.digest, row.fingerprint),
        ("keep_ratio", keep_ratio, row.keep_ratio),
    ):
        if said != wanted:
            raise MisfiledError(f"the catalog row points to a blob of another {name}", where=f"blob {row.blob_key}")


def check_header(row: CacheRow, path: Path) -> None:
    """Run `check_identity` on the header of a sound blob, without torch, which takes seconds to import.

    Raises:
        MisfiledError: Blob and row differ, or the blob is not a distilled cache.
        FingerprintMismatchError: The blob has another format version.
    """
    data = _header_bytes(path)
    try:
        header = json.loads(json.loads(data)["__metadata__"]["kv_memory"])
        fingerprint = Fingerprint.from_json(json.dumps(header["fingerprint"]))
        text_sha256, keep_ratio = header.get("text_sha256"), header["keep_ratio"]
    except (ValueError, TypeError, KeyError, AttributeError, CorruptCacheError) as error:
        what = "the catalog row points to a blob that is not a distilled cache"
        raise MisfiledError(what, where=f"blob {row.blob_key}") from error
    check_identity(row, text_sha256=text_sha256, fingerprint=fingerprint, keep_ratio=keep_ratio)


def _header_bytes(path: Path) -> bytes:
    # Contract: the safetensors format, eight bytes of length and then JSON.
    with mapped(path):
        try:
            with open(path, "rb") as file:
                n_bytes = int.from_bytes(file.read(8), "little")
                return file.read(min(n_bytes, _MOST_BYTES))
        except FileNotFoundError:
            raise CorruptCacheError("the blob is missing", where=str(path)) from None
