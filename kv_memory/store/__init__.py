"""The store: a catalog of documents and distilled caches in SQL, and their tensors as checked files.

`Store` is the entry point. Documents and `DistilledCache` go in and come out; nothing here depends on a model.
"""

from __future__ import annotations

from kv_memory.store.eviction import Limits
from kv_memory.store.records import (
    CacheInfo,
    CheckReport,
    DocumentRecord,
    DocumentSummary,
    GcReport,
    PassageRecord,
    PurgeReport,
    StoredPassage,
    StoreStats,
)
from kv_memory.store.store import Store
from kv_memory.store.transfer.part_files import ExportReport, ImportReport, TransferProgress, open_archive

__all__ = [
    "CacheInfo",
    "CheckReport",
    "DocumentRecord",
    "DocumentSummary",
    "ExportReport",
    "GcReport",
    "ImportReport",
    "Limits",
    "PassageRecord",
    "PurgeReport",
    "Store",
    "StoreStats",
    "StoredPassage",
    "TransferProgress",
    "open_archive",
]
