"""Whether a blob is what its row says: a sound blob may be another text's, if a row was swapped or tampered with."""

from __future__ import annotations

import json
from pathlib import Path

from kv_memory.cache.fingerprint import Fingerprint
from kv_memory.errors import CorruptCacheError
from kv_memory.store.error_mapping import mapped
from kv_memory.store.sql.schema import CacheRow

__all__ = ["MisfiledError", "check_filing", "check_header"]

_MOST_BYTES = 100 * 2**20  # of a header, as in safetensors itself: of what is longer, and no JSON then, a part is read


class MisfiledError(CorruptCacheError):
    """A row names the sound blob of something else. Never leaves the store: callers get `CorruptCacheError`."""


def check_filing(row: CacheRow, *, text_sha256: str | None, fingerprint: Fingerprint, keep_ratio: float) -> None:
    """Compare what a blob says of itself with its row.

    Args:
        row: Of the catalog.
        text_sha256: Of the blob; None in those of the first versions, which do not say.
        fingerprint: Of the blob.
        keep_ratio: Of the blob.

    Raises:
        MisfiledError: They differ.
    """
    for name, said, wanted in (
        ("text", text_sha256 or row.text_sha256, row.text_sha256),
        ("fingerprint", fingerprint.digest, row.fingerprint),
        ("keep_ratio", keep_ratio, row.keep_ratio),
    ):
        if said != wanted:
            raise MisfiledError(f"the catalog names the blob of another {name}", where=f"blob {row.blob_key}")


def check_header(row: CacheRow, path: Path) -> None:
    """`check_filing` with the header of a sound blob. Reads it without torch, which takes seconds to import.

    Raises:
        MisfiledError: They differ, or the blob is no distilled cache.
        FingerprintMismatchError: The blob has another format version.
    """
    data = _header_bytes(path)
    try:
        header = json.loads(json.loads(data)["__metadata__"]["kv_memory"])
        fingerprint = Fingerprint.from_json(json.dumps(header["fingerprint"]))
        text_sha256, keep_ratio = header.get("text_sha256"), header["keep_ratio"]
    except (ValueError, TypeError, KeyError, AttributeError, CorruptCacheError) as error:
        what = "the catalog names a blob that is no distilled cache"
        raise MisfiledError(what, where=f"blob {row.blob_key}") from error
    check_filing(row, text_sha256=text_sha256, fingerprint=fingerprint, keep_ratio=keep_ratio)


def _header_bytes(path: Path) -> bytes:
    # Contract: the safetensors format, eight bytes of length and then JSON.
    with mapped(path):
        try:
            with open(path, "rb") as file:
                n_bytes = int.from_bytes(file.read(8), "little")
                return file.read(min(n_bytes, _MOST_BYTES))
        except FileNotFoundError:
            raise CorruptCacheError("the blob is missing", where=str(path)) from None
