"""The store: a catalog of documents and distilled caches in SQL, and their tensors as checked files.

`Store` is the entry point. Documents and `DistilledCache` go in and come out; nothing here depends on a model.
"""

from __future__ import annotations

from kv_memory.store.archive import ExportReport, export_collection, import_archive, open_archive
from kv_memory.store.copy import OnConflict, copy_collection
from kv_memory.store.eviction import Limits
from kv_memory.store.records import (
    CacheInfo,
    CheckReport,
    CopyReport,
    DocumentRecord,
    DocumentSummary,
    GcReport,
    PassageRecord,
    PurgeReport,
    StoredPassage,
    StoredVector,
    StoreStats,
    TransferProgress,
)
from kv_memory.store.store import Store

__all__ = [
    "CacheInfo",
    "CheckReport",
    "CopyReport",
    "DocumentRecord",
    "DocumentSummary",
    "ExportReport",
    "GcReport",
    "Limits",
    "OnConflict",
    "PassageRecord",
    "PurgeReport",
    "Store",
    "StoreStats",
    "StoredPassage",
    "StoredVector",
    "TransferProgress",
    "copy_collection",
    "export_collection",
    "import_archive",
    "open_archive",
]
