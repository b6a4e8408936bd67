"""A SQL query: each row is a document, addressed by its key through the same query."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnClause,
    Connection,
    Engine,
    Select,
    column,
    create_engine,
    literal_column,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from kv_memory.errors import ConfigError, UnreadableDocumentError
from kv_memory.jobs.job_records import JobSettings, SourceItem
from kv_memory.jobs.sources.source import ReadItem, Source, changed, read_record

_ROWS_AT_ONCE = 500


def check_url(url: str) -> str:
    """The URL of a database for display, without its password; a ConfigError if it is no database URL."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError as error:
        raise ConfigError(
            "not a database URL",
            where="SOURCE",
            next_step="Write sql:DIALECT://USER@HOST/DATABASE, e.g. sql:sqlite:///notes.db.",
        ) from error


class SqlSource(Source):
    """The rows of a query with a column for the key and one for the text, which the settings name.

    Reading a document does not run the query for all rows, but for one: `SELECT * FROM (QUERY) WHERE id = ...`.
    Databases answer that at once if the key is indexed. In uris, the number of the source in its job stands for the
    URL, because a URL may contain a password.
    """

    def __init__(self, number: int, url: str, query: str, settings: JobSettings) -> None:
        self._where = check_url(url)
        self.uri = f"sql:{number}"
        self._url = url
        key: ColumnClause[Any] = column(settings.id_field)
        # Passed on as it is: without the backslashes, `text` would take ':harbour' for a parameter.
        statement = query.strip().rstrip(";").replace(":", r"\:")
        self._key = text(statement).columns(key).subquery("kv_rows").c[key.name]
        self._settings = settings
        self._engine: Engine | None = None

    def items(self) -> Iterator[SourceItem]:
        """See `Source.items`; only the keys are fetched, a few hundred rows at a time."""
        with self._connected() as connection:
            streaming = connection.execution_options(stream_results=True, yield_per=_ROWS_AT_ONCE)
            for number, value in enumerate(streaming.scalars(select(self._key)), start=1):
                error = _without_key(self._key.name, number).to_dict() if value is None else None
                id_ = f"row {number}" if value is None else str(value)
                yield SourceItem(document_id=id_, uri=f"{self.uri}#{_written(value)}", error=error)

    def read(self, item: SourceItem) -> ReadItem:
        """See `Source.read`."""
        rows: Select[Any] = select(literal_column("*")).select_from(self._key.table)
        with self._connected() as connection:
            row = connection.execute(rows.where(self._key == json.loads(item.locator))).mappings().first()
        if row is None:
            raise changed(item)
        return read_record({name: _plain(value) for name, value in row.items()}, item, self._settings)

    def close(self) -> None:
        """Close the connections."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        try:
            if self._engine is None:
                self._engine = create_engine(self._url)
            with self._engine.connect() as connection:
                yield connection
        except (NoSuchModuleError, ImportError) as error:
            raise ConfigError(
                f"no driver for this database is installed: {error}",
                where=self._where,
                next_step="Install the driver that SQLAlchemy names, e.g. `pip install 'kv-memory[postgres]'`.",
            ) from error
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise UnreadableDocumentError(
                f"the query failed: {reason}",
                where=self._where,
                next_step="Try it in the database's own shell. It must return the columns of --id-field and "
                "--text-field.",
            ) from error


def _without_key(key: str, number: int) -> UnreadableDocumentError:
    return UnreadableDocumentError(
        f"the key {key!r} of this row is NULL, so it can neither be named nor found again",
        where=f"row {number}",
        next_step=f"Give every row a key, or leave such rows out: WHERE {key} IS NOT NULL.",
    )


def _written(value: Any) -> str:
    """A key for a uri, as JSON: a number stays a number, since databases do not compare numbers with texts."""
    return json.dumps(value if isinstance(value, int | float | str) else str(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return float(value)
    return str(value) if isinstance(value, UUID) else value
