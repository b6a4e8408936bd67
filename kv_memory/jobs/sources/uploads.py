"""Documents that came over HTTP and wait in the store's folder, as JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from kv_memory.documents import Document
from kv_memory.jobs.job_records import SourceItem
from kv_memory.jobs.sources.source import ReadItem, Source, changed, uri_of
from kv_memory.store.error_mapping import mapped
from kv_memory.store.fs import fsync_folder, private_folder, private_opener


def write_uploads(path: Path, documents: Sequence[Document]) -> None:
    """Write documents to a new file, which only its owner may read and which survives a power cut.

    Raises:
        StoreFullError: No space is left; there is then no file.
    """
    temporary = path.with_suffix(".tmp")
    with mapped(path):
        private_folder(path.parent)
        try:
            with open(temporary, "w", encoding="utf-8", opener=private_opener) as file:
                for each in documents:
                    record = {"id": each.id, "text": each.text, "metadata": dict(each.metadata), "notes": each.notes}
                    file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(str(path.parent))


class UploadSource(Source):
    """The documents of a file of `write_uploads`, addressed by their byte offsets.

    A source of JSON lines would lose metadata that are not flat, and name a file that is deleted after the job as the
    documents' origin.
    """

    def __init__(self, path: Path) -> None:
        self.uri = uri_of(path)
        self._path = path

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`."""
        with mapped(self._path), self._path.open("rb") as file:
            start = 0
            for line in file:
                uri = f"{self.uri}#{start}"
                yield SourceItem(document_id=json.loads(line)["id"], uri=uri, size_bytes=len(line))
                start += len(line)

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        try:
            with self._path.open("rb") as file:
                file.seek(int(item.locator))
                record = json.loads(file.readline())
        except FileNotFoundError as error:
            raise changed(item) from error
        record["notes"] = tuple(record["notes"])
        return ReadItem(document=Document(**record))
