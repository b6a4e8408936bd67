"""Sources of documents: files, JSON lines, Parquet, SQL, the hub, document stores of LlamaIndex.

An argument of the user becomes a spec, a dict that the ledger stores. A spec becomes a `Source`: the driver lists its
documents, and a worker reads one of them.
"""

from __future__ import annotations

import glob as globbing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kv_memory.errors import ConfigError, KVMemoryError, UnreadableDocumentError
from kv_memory.jobs.job_records import JobSettings, SourceItem
from kv_memory.jobs.sources.docstore import DocstoreSource, is_docstore
from kv_memory.jobs.sources.files import FileSource, is_pattern
from kv_memory.jobs.sources.row_files import HubSource, JsonLinesSource, ParquetSource, parse_hub_name
from kv_memory.jobs.sources.source import ReadItem, Source
from kv_memory.jobs.sources.sql import SqlSource, check_url
from kv_memory.jobs.sources.uploads import UploadSource

__all__ = ["Sources", "name_of", "parse_sources"]

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}


def parse_sources(texts: Sequence[str], *, glob: str | None = None, query: str | None = None) -> list[dict[str, Any]]:
    """Turn the user's arguments into specs: files, folders, patterns; `hub:NAME`; `sql:URL`, which needs a query.

    Raises:
        ConfigError: A name or URL is malformed, a `sql:` source has no query, or an option is given without a source
            that it applies to.
        UnreadableDocumentError: A file or folder does not exist, or no file of records matches a pattern.
    """
    specs: list[dict[str, Any]] = []
    for text in texts:
        if text.startswith("hub:"):
            parse_hub_name(text[4:])  # raises if it is malformed
            specs.append({"kind": "hub", "name": text[4:]})
        elif text.startswith("sql:"):
            check_url(text[4:])
            if not query:
                raise ConfigError(
                    "a database needs a query",
                    where=text.partition("://")[0],
                    next_step='Pass one, for example --query "SELECT id, text FROM notes".',
                )
            specs.append({"kind": "sql", "url": text[4:], "query": query})
        else:
            specs += _files(text, glob)
    if query and not any(spec["kind"] == "sql" for spec in specs):
        raise ConfigError(
            "--query needs a source that begins with sql:, and none is given",
            where="query",
            next_step="Pass the database, for example sql:sqlite:///notes.db, or leave --query out.",
        )
    if glob and not any(os.path.isdir(text) for text in texts):
        raise ConfigError(
            "--glob needs a folder, and none is given",
            where="glob",
            next_step="Pass a folder, or leave --glob out: a source can itself be a pattern, in quotes.",
        )
    return specs


def _files(text: str, glob: str | None) -> list[dict[str, Any]]:
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isdir(path):
        if glob is None or _kind_of(glob) is None:
            return [{"kind": "files", "path": path, "glob": glob}]
        path = os.path.join(globbing.escape(path), glob if "/" in glob else f"**/{glob}")
    kind, next_step = _kind_of(path), f"Check the path; relative ones start at {Path.cwd()}."
    if not is_pattern(path):
        if not os.path.exists(path):
            raise UnreadableDocumentError("no such file or folder", where=text, next_step=next_step)
        kind = kind or ("docstore" if is_docstore(Path(path)) else None)
    elif kind is not None:
        # Files of records are few, so each is a source of its own.
        found = sorted(name for name in globbing.glob(path, recursive=True) if os.path.isfile(name))
        if not found:
            raise UnreadableDocumentError("no file matches this pattern", where=text, next_step=next_step)
        return [{"kind": kind, "path": name} for name in found]
    return [{"kind": kind or "files", "path": path, "glob": None}]


def _kind_of(path: str) -> str | None:
    return _KINDS.get(Path(path).suffix.lower())


def name_of(spec: dict[str, Any]) -> str:
    """Name of a source for display, without passwords."""
    if spec["kind"] == "sql":
        return f"sql:{check_url(spec['url'])}"
    if spec["kind"] == "hub":
        return f"hub:{spec['name']}"
    return os.path.join(spec["path"], spec["glob"]) if spec.get("glob") else str(spec["path"])


def _source_of(number: int, spec: dict[str, Any], settings: JobSettings) -> Source:
    kind = spec["kind"]
    if kind == "sql":
        return SqlSource(number, spec["url"], spec["query"], settings)
    if kind == "hub":
        return HubSource(spec["name"], settings)
    if kind == "uploads":
        return UploadSource(Path(spec["path"]))
    if kind == "docstore":
        return DocstoreSource(Path(spec["path"]))
    if kind == "files":
        return FileSource(spec["path"], glob=spec["glob"], encoding=settings.encoding)
    return (JsonLinesSource if kind == "jsonl" else ParquetSource)(Path(spec["path"]), settings)


class Sources:
    """All sources of a job, from the specs of `parse_sources`."""

    def __init__(self, specs: Sequence[dict[str, Any]], settings: JobSettings) -> None:
        self._names = [name_of(spec) for spec in specs]
        self._sources = [_source_of(number, spec, settings) for number, spec in enumerate(specs)]
        self._by_uri = {source.uri: source for source in self._sources}
        self._files = FileSource("", encoding=settings.encoding)

    def items(self) -> Iterator[SourceItem]:
        """Yield the documents of all sources; a source that fails becomes an item with an error; the rest continue."""
        for name, source in zip(self._names, self._sources, strict=True):
            try:
                yield from source.items()
            except KVMemoryError as error:
                yield SourceItem(document_id=name, uri=name, error=error.to_dict())
            finally:
                source.close()

    def read(self, item: SourceItem) -> ReadItem:
        """Read one document; its source stays open for the next one. Errors as in `Source.read`."""
        base, behind, _ = item.uri.partition("#")
        source = self._by_uri.get(base) if behind else self._files
        if source is None:
            raise ConfigError(
                "the document is not in any source of the job",
                where=item.uri,
                next_step="Start a new job for it with `kv-memory job run`.",
            )
        return source.read(item)

    def close(self) -> None:
        """Close the open sources."""
        for source in self._sources:
            source.close()
