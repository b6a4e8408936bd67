"""Sources of a job by name, and all their documents, for the tests of sources."""

from __future__ import annotations

import json
from typing import Any

from kv_memory.jobs import JobSettings
from kv_memory.jobs.sources import Sources, parse_sources
from kv_memory.jobs.sources.source import ReadItem

SETTINGS = JobSettings(memory={})


opened: list[Sources] = []


def sources_of(*texts: object, settings: JobSettings = SETTINGS, **options: Any) -> Sources:
    specs = parse_sources([str(text) for text in texts], **options)
    opened.append(Sources(json.loads(json.dumps(specs)), settings))  # as the ledger keeps them
    return opened[-1]


def read_all(sources: Sources, *, backwards: bool = False) -> dict[str, ReadItem]:
    """What the items are when each is read by its uri alone."""
    items = list(sources.items())
    assert len({item.document_id for item in items}) == len(items)
    return {item.document_id: sources.read(item) for item in (reversed(items) if backwards else items)}


def texts(found: dict[str, ReadItem]) -> dict[str, str]:
    return {id_: read.document.text for id_, read in found.items()}
