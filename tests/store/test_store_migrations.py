from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.schema import CreateTable
from store_samples import make_cache, sha

import kv_memory.jobs.job_tables  # noqa: F401  its tables are in the catalog too
from kv_memory.errors import StoreError
from kv_memory.store import Store
from kv_memory.store.sql.catalog import MIGRATIONS, Catalog
from kv_memory.store.sql.schema import SCHEMA_HEAD, Base


def differences(catalog: Path) -> list[object]:
    engine = sa.create_engine(f"sqlite:///{catalog}")
    try:
        with engine.connect() as connection:
            options = {"compare_type": True, "compare_server_default": True}
            return list(compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata))
    finally:
        engine.dispose()


def test_migrations_match_the_models(store: Store) -> None:
    catalog = store.path / "catalog.sqlite"
    assert differences(catalog) == []
    with closing(sqlite3.connect(catalog)) as connection:
        connection.execute("ALTER TABLE document DROP COLUMN source_uri")
    assert len(differences(catalog)) == 1


def test_migrations_make_the_same_constraints_as_the_models(store: Store) -> None:
    """The comparison above does not look at primary keys and names; SQLite's own text of the tables does."""

    def words(statement: str) -> set[str]:
        return {
            line.strip().rstrip(",")
            for line in statement.replace('"', "").replace(", ", ",\n").splitlines()  # added columns share a line
            if line.strip() not in {"", ")"}
        }

    with closing(sqlite3.connect(store.path / "catalog.sqlite")) as connection:
        made = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
    dialect = sa.create_engine("sqlite://").dialect
    for table in Base.metadata.sorted_tables:
        assert words(made[table.name]) == words(str(CreateTable(table).compile(dialect=dialect))), table.name


def test_schema_head_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [SCHEMA_HEAD]


def test_a_store_of_a_newer_version_is_refused_unchanged(store: Store) -> None:
    catalog = store.path / "catalog.sqlite"
    store.close()
    with closing(sqlite3.connect(catalog)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = catalog.read_bytes()
    with pytest.raises(StoreError, match="9999") as caught:
        Store.open(store.path)
    assert caught.value.next_step is not None and "Upgrade" in caught.value.next_step
    assert catalog.read_bytes() == before


def test_a_foreign_database_is_refused_unchanged(tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.sqlite"
    with closing(sqlite3.connect(catalog)) as connection, connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    before = catalog.read_bytes()
    with pytest.raises(StoreError, match="not a catalog"):
        Store.open(tmp_path)
    assert catalog.read_bytes() == before


def test_an_interrupted_creation_is_completed(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite").touch()  # what a kill between making the file and its tables leaves
    with Store.open(tmp_path) as store:
        assert store.documents() == []
        assert differences(tmp_path / "catalog.sqlite") == []
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_opening_a_store_at_head_does_not_start_alembic(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("migrating")

    monkeypatch.setattr(Catalog, "_migrate", refuse)
    Store.open(store.path).close()
    with pytest.raises(AssertionError, match="migrating"):
        Store.open(store.path / "new")


def test_the_catalog_is_durable_and_checks_foreign_keys(store: Store) -> None:
    with store.catalog.read() as session:
        pragmas = {
            name: session.execute(sa.text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}


def test_blob_rows_are_as_durable_as_cache_rows(store: Store) -> None:
    store.put(sha("x"), make_cache(1))
    with store.references.blobs._cache() as cache:
        assert cache._sql("PRAGMA synchronous").fetchone() == (2,)
        assert cache._sql("PRAGMA journal_mode").fetchone() == ("wal",)
