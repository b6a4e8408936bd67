"""Where a store's parts are: given once, remembered in the folder, refused where they differ."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from store_samples import FINGERPRINT, make_cache, sha

from kv_memory.errors import ConfigError, StoreConnectionError, StoreError, StoreFullError
from kv_memory.store import Store
from kv_memory.store.sql.catalog import Catalog
from kv_memory.store.sql.schema import SCHEMA_HEAD

Place = Callable[[str], dict[str, Any]]


@pytest.mark.postgres
@pytest.mark.s3
def test_two_folders_share_one_store(place: Place, tmp_path: Path) -> None:
    """As two machines would: each has its folder, what one puts the other reads."""
    where = place("postgres-s3")
    with Store.open(tmp_path / "one", **where) as one, Store.open(tmp_path / "two", **where) as two:
        info = one.put(sha("x"), make_cache(1))
        assert two.get(sha("x"), FINGERPRINT, 0.25).n_kept == 8
        assert (tmp_path / "two" / "blobs").is_dir() and two.check().n_blobs == 1
        two.delete(sha("x"))
        assert not one.has(sha("x"), FINGERPRINT, 0.25)
        assert one.check().ok, "one's copy in its tier is no blob of the store"
        again = one.put(sha("x"), make_cache(1))
        assert again.blob_key == info.blob_key and two.get(sha("x"), FINGERPRINT, 0.25).n_kept == 8
    with Store.open(tmp_path / "one", create=False) as again_one:  # the folder knows where
        assert again_one.has(sha("x"), FINGERPRINT, 0.25) and again_one.blobs_url == where["blobs"]


def test_the_location_file_is_private_and_plain(place: Place, tmp_path: Path) -> None:
    where = place("sqlite-folder")
    Store.open(tmp_path / "s", **where, tier_size_bytes=10**6).close()
    file = tmp_path / "s" / "store.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text()) == {"format": 1, "catalog": None, "tier_size_bytes": 10**6, **where}
    Store.open(tmp_path / "s", tier_size_bytes=2 * 10**6).close()
    assert json.loads(file.read_text())["tier_size_bytes"] == 2 * 10**6


def test_a_location_other_than_the_recorded_one_is_refused(place: Place, tmp_path: Path) -> None:
    Store.open(tmp_path / "s", **place("sqlite-folder")).close()
    with pytest.raises(ConfigError, match="blobs") as caught:
        Store.open(tmp_path / "s", blobs="s3://another/place")
    assert caught.value.next_step is not None
    with pytest.raises(ConfigError, match="catalog"):
        Store.open(tmp_path / "s", catalog="postgresql+psycopg://someone:secret@nowhere/db")
    Store.open(tmp_path / "plain").close()
    with pytest.raises(ConfigError, match="its own catalog"):
        Store.open(tmp_path / "plain", **place("sqlite-folder"))


def test_errors_do_not_contain_the_password(tmp_path: Path) -> None:
    url = "postgresql+psycopg://someone:secret@127.0.0.1:9/db"
    with pytest.raises(StoreConnectionError) as caught:
        Store.open(tmp_path / "s", catalog=url)
    assert "secret" not in str(caught.value) and "127.0.0.1" in str(caught.value)


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ({"catalog": "mysql://host/db"}, "must be in PostgreSQL"),
        ({"catalog": "no url"}, "this is not a database URL"),
        ({"catalog": "postgresql://h/d?schema=a-b"}, "schema"),
        ({"blobs": "ftp://host/x"}, "invalid URL for blobs"),
        ({"blobs": "/data/blobs"}, "invalid URL for blobs"),
        ({"blobs": "file://relative"}, "must be an absolute path"),
        ({"blobs": "file:///tmp/x", "tier_size_bytes": 0}, "tier_size_bytes"),
    ],
)
def test_invalid_locations_are_refused(tmp_path: Path, where: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        Store.open(tmp_path / "s", **where)
    assert caught.value.next_step is not None or "schema" in match
    assert not (tmp_path / "s" / "catalog.sqlite").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1, "elsewhere": 1}'])
def test_an_invalid_location_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(StoreError, match="cannot be read") as caught:
        Store.open(tmp_path)
    assert caught.value.next_step is not None and not (tmp_path / "catalog.sqlite").exists()


def test_the_tier_keeps_its_size_and_refetches_dropped_blobs(place: Place, tmp_path: Path) -> None:
    with Store.open(tmp_path / "s", **place("sqlite-folder"), tier_size_bytes=500_000) as store:
        size = 0
        for number in range(30):
            size = store.put(sha(f"{number}"), make_cache(number, n_kept=300)).size_bytes
        tier = sum(file.stat().st_size for file in (tmp_path / "s" / "blobs").rglob("*.val"))
        assert 0 < tier < 500_000 + 2 * size < 30 * size
        for number in range(30):
            assert store.get(sha(f"{number}"), FINGERPRINT, 0.25).n_kept == 300
        assert store.check().ok and store.check().n_blobs == 30


def test_the_error_of_a_too_small_tier_names_it(place: Place, tmp_path: Path) -> None:
    with Store.open(tmp_path / "s", **place("sqlite-folder"), tier_size_bytes=100) as store:
        store.put(sha("x"), make_cache(1, n_kept=500))
        try:
            assert store.get(sha("x"), FINGERPRINT, 0.25).n_kept == 500
        except StoreFullError as error:
            assert "tier" in str(error)


@pytest.mark.postgres
def test_an_old_shared_catalog_is_upgraded_only_by_the_command(place: Place, tmp_path: Path) -> None:
    import sqlalchemy as sa

    where = place("postgres-disk")
    with Store.open(tmp_path / "s", **where) as store, store.catalog.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '0000'"))
    with pytest.raises(StoreError, match="0000") as caught:
        Store.open(tmp_path / "s")
    assert "db upgrade" in str(caught.value.next_step)
    with closing(Catalog(where["catalog"])) as catalog:
        assert catalog.revision() == "0000"


@pytest.mark.postgres
def test_the_migration_matches_the_models_on_postgresql(place: Place, tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    import kv_memory.jobs.job_tables  # noqa: F401  its tables are in the catalog too
    from kv_memory.store.sql.schema import Base

    with Store.open(tmp_path / "s", **place("postgres-disk")) as store:
        assert store.catalog.revision() == SCHEMA_HEAD
        with store.catalog._engine.connect() as connection:
            options = {"compare_type": True, "compare_server_default": True}
            context = MigrationContext.configure(connection, opts=options)
            assert list(compare_metadata(context, Base.metadata)) == []
