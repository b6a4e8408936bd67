"""From a document to its distilled cache: scorer, routed adapter, selectors, Compressor."""

from kv_memory.compress.adapter import Adapter, AdapterConfig
from kv_memory.compress.compressor import Compressor, PrefilledDocument
from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.matching import Matched
from kv_memory.compress.refine.optimize import refine_batch
from kv_memory.compress.refine.refine_settings import RefineSettings
from kv_memory.compress.selectors import ObservedAttention, Reconstruction, Selector, SinkRecent

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Compressor",
    "MatchSettings",
    "Matched",
    "ObservedAttention",
    "PrefilledDocument",
    "Reconstruction",
    "RefineSettings",
    "Selector",
    "SinkRecent",
    "refine_batch",
]
