"""`kv-memory db`, `budget`, `pin`, `unpin` and `stats --prometheus`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kv_memory.config import seconds_of, size_of
from kv_memory.errors import ConfigError
from kv_memory.store.sql.schema import SCHEMA_HEAD
from tests.cli.conftest import FERRY, LIGHT
from tests.cli.ran import Ran

Kv = Callable[..., Ran]


@pytest.mark.postgres
@pytest.mark.s3
def test_a_shared_store_from_init_to_answer(
    kv: Kv, tiny: Path, place: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    where = place("postgres-s3")
    made = kv(
        "db", "init", "team", "--catalog", where["catalog"], "--blobs", where["blobs"], "--tier", "50MB", "--json"
    )
    assert made.code == 0 and made.json["blobs"] == where["blobs"] and made.json["n_documents"] == 0
    (tmp_path / "ferry.txt").write_text(FERRY)
    assert kv("add", "ferry.txt", "--store", "team", "--model", tiny).code == 0
    joined = kv("db", "init", "other-machine", "--catalog", where["catalog"], "--blobs", where["blobs"])
    assert joined.code == 0 and "has 1 documents" in joined.out
    asked = kv("ask", "When does the ferry leave?", "--store", "other-machine", "--max-new-tokens", "4", "--json")
    assert asked.code == 0 and asked.json["n_cached_tokens"] > 0
    assert kv("db", "current", "--store", "team", "--json").json["revision"] == SCHEMA_HEAD
    assert f"Already {SCHEMA_HEAD}" in kv("db", "upgrade", "--store", "team").out


def test_db_commands_fail_without_a_store(kv: Kv) -> None:
    for command in ("current", "upgrade"):
        done = kv("db", command, "--store", "nowhere")
        assert done.code == 1 and "no store" in done.err and not Path("nowhere").exists()


def test_size_limits_evict_and_pins_protect(kv: Kv, tiny: Path, tmp_path: Path) -> None:
    for name, text in (("ferry.txt", FERRY), ("light.txt", LIGHT)):
        (tmp_path / name).write_text(text)
    assert kv("add", "ferry.txt", "light.txt", "--model", tiny).code == 0
    assert "Pinned" in kv("pin", "ferry.txt").out
    before = kv("budget", "--json").json
    assert before == {
        "max_size_bytes": None,
        "store_max_size_bytes": None,
        "ttl_s": None,
        "cache_bytes": before["cache_bytes"],
        "n_evicted": 0,
    }
    after = kv("budget", "--max-size", str(before["cache_bytes"] - 1), "--ttl", "30d", "--json").json
    assert after["n_evicted"] == 1 and after["ttl_s"] == 30 * 86400
    left = kv("show", "ferry.txt", "--json").json
    assert left["caches"] and left["caches"][0]["pinned"]
    full = kv("budget", "--max-size", "10")
    assert full.code == 1 and "unpin" in full.err
    assert "Unpinned" in kv("unpin", "ferry.txt").out
    assert kv("budget", "--max-size", "10").code == 0
    assert kv("budget", "--max-size", "none", "--ttl", "none", "--json").json["max_size_bytes"] is None
    wrong = kv("budget", "--max-size", "much")
    assert wrong.code == 2 and "500MB" in wrong.err


def test_prometheus_text(kv: Kv, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "ferry.txt").write_text(FERRY)
    kv("add", "ferry.txt", "--model", tiny)
    done = kv("stats", "--prometheus")
    values = {s.name: s.value for f in text_string_to_metric_families(done.out) for s in f.samples}
    assert values["kv_memory_documents"] == 1 == values["kv_memory_caches"]
    assert kv("stats", "--prometheus", "--json").code == 2


@pytest.mark.parametrize(("text", "size"), [("500MB", 500 * 10**6), ("2GiB", 2 * 2**30), ("1.5 kb", 1500), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert size_of(text, where="--max-size") == size


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("12h", 43200), ("30d", 2592000), ("5min", 300)])
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text, where="--ttl") == seconds


@pytest.mark.parametrize("text", ["", "0", "-1MB", "3 parsecs", "1e9", "MB"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="invalid value"):
        size_of(text, where="--max-size")
