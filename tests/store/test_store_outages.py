"""An object store that is slow, wrong, gone or forbidden: typed errors, soon, and nothing lost."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import Proxy, faulty_proxy
from store_samples import FINGERPRINT, document, equal, make_cache, sha, within

from kv_memory.errors import ConfigError, StoreConnectionError, StoreError
from kv_memory.store import Limits, Store
from tests import services

RETRY_S = 1.2
SOON_S = 8.0  # a request is tried for RETRY_S, the last try takes its timeout; and this machine is busy


@pytest.fixture(scope="module")
def proxy(s3_endpoint: str) -> Iterator[Proxy]:
    with faulty_proxy(s3_endpoint) as made:
        yield made


@pytest.fixture
def behind(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store with three caches, in S3 behind the proxy, and nothing of them in its tier."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("KV_MEMORY_BLOBS_TIMEOUT_S", "0.3")
    monkeypatch.setenv("KV_MEMORY_BLOBS_RETRY_S", str(RETRY_S))
    proxy.heal()
    with Store.open(tmp_path / "store", blobs=f"s3://{services.BUCKET}/{uuid.uuid4().hex}") as store:
        for seed in range(3):
            store.put(sha(f"text {seed}"), make_cache(seed))
        store.put_document(document("a", *(f"text {seed}" for seed in range(3))))
        forget(store)
        yield store
        proxy.heal()


def forget(store: Store) -> None:
    """Take all copies out of the tier."""
    blobs: Any = store.references.blobs
    for key in blobs.tier.audit(min_age_s=0).keys:
        blobs.tier.delete(key)


def all_there(store: Store) -> None:
    forget(store)
    for seed in range(3):
        assert equal(store.get(sha(f"text {seed}"), FINGERPRINT, 0.25), make_cache(seed))
    report = store.check()
    assert not report.missing and not report.damaged and not report.misfiled
    assert store.stats().n_quarantined == 0


def test_a_few_failed_requests_are_retried_unnoticed(behind: Store, proxy: Proxy) -> None:
    for fault in ("500", "reset", "silent"):
        forget(behind)
        proxy.fail(fault, "GET", times=2)
        assert equal(behind.get(sha("text 0"), FINGERPRINT, 0.25), make_cache(0)), fault
        assert proxy.n_requests >= 3
        proxy.fail(fault, "PUT", times=2)
        behind.put(sha(f"new {fault}"), make_cache(50))
    proxy.heal()
    all_there(behind)


READ_FAULTS = ["500", "reset", "silent", "cut", "more", "less", "flip", "403"]


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_reading_in_an_outage_fails_quickly_and_loses_nothing(behind: Store, proxy: Proxy, fault: str) -> None:
    proxy.fail(fault, "GET")
    kind = StoreError if fault == "403" else StoreConnectionError
    for ask in (lambda: behind.get(sha("text 0"), FINGERPRINT, 0.25), behind.check):
        with within(SOON_S), pytest.raises(kind) as caught:
            ask()
        assert caught.value.where is not None and "s3://" in caught.value.where
        assert caught.value.next_step is not None
    assert proxy.n_requests < 40, "tries are bounded"
    assert behind.has(sha("text 0"), FINGERPRINT, 0.25)
    proxy.heal()
    all_there(behind)


@pytest.mark.parametrize("fault", ["500", "reset", "silent", "403"])
def test_writing_in_an_outage_fails_quickly_and_leaves_nothing(behind: Store, proxy: Proxy, fault: str) -> None:
    proxy.fail(fault)
    kind = StoreError if fault == "403" else StoreConnectionError
    with within(2 * SOON_S), pytest.raises(kind):
        behind.put(sha("new"), make_cache(9))
    assert not behind.has(sha("new"), FINGERPRINT, 0.25)
    with within(2 * SOON_S), pytest.raises(kind):
        behind.put_prefix("p", b"prefix")
    assert len(behind.caches()) == 3
    proxy.heal()
    all_there(behind)
    behind.put(sha("new"), make_cache(9))
    forget(behind)
    assert equal(behind.get(sha("new"), FINGERPRINT, 0.25), make_cache(9))


def test_a_lost_answer_after_a_finished_write_does_no_harm(behind: Store, proxy: Proxy) -> None:
    proxy.fail("cut", "PUT", times=1)  # it was written; the answer breaks off
    behind.put(sha("new"), make_cache(9))
    proxy.heal()
    forget(behind)
    assert equal(behind.get(sha("new"), FINGERPRINT, 0.25), make_cache(9))
    assert behind.check().ok


def test_deleting_in_an_outage_leaves_an_orphan_for_gc(behind: Store, proxy: Proxy) -> None:
    proxy.fail("500")
    with within(2 * SOON_S):
        behind.delete(sha("text 2"))  # the row is gone; the object cannot be reached
    assert len(behind.caches()) == 2
    proxy.heal()
    assert len(behind.check().orphans) == 1
    assert behind.gc().n_orphan_blobs == 1 and behind.check().ok


def test_evicting_in_an_outage_leaves_orphans_for_gc(behind: Store, proxy: Proxy) -> None:
    proxy.fail("reset", "DELETE", "HEAD", "POST")
    size = behind.caches()[0].size_bytes
    with within(3 * SOON_S):
        behind.set_limits(Limits(max_size_bytes=2 * size))
    assert len(behind.caches()) == 2
    proxy.heal()
    behind.gc()
    assert behind.check().ok and behind.check().n_blobs == 2


def test_blobs_in_the_tier_are_readable_during_an_outage(behind: Store, proxy: Proxy) -> None:
    behind.get(sha("text 0"), FINGERPRINT, 0.25)
    proxy.fail("500")
    with within(1):
        assert equal(behind.get(sha("text 0"), FINGERPRINT, 0.25), make_cache(0))


def test_a_missing_bucket_is_not_reported_as_lost_blobs(
    behind: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = behind.path / "store.json"
    said = file.read_text()
    file.write_text(said.replace(services.BUCKET, "no-such-bucket"))
    with Store.open(behind.path, create=False) as other:
        with pytest.raises(StoreConnectionError, match="no such bucket"):
            other.get(sha("text 0"), FINGERPRINT, 0.25)
        for upkeep in (other.check, other.gc):
            with pytest.raises(StoreConnectionError):
                upkeep()
        with pytest.raises(StoreConnectionError):
            other.put(sha("new"), make_cache(9))
    file.write_text(said)
    all_there(behind)


@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf"])
def test_invalid_seconds_in_the_environment_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_endpoint: str, value: str
) -> None:
    monkeypatch.setenv("KV_MEMORY_BLOBS_TIMEOUT_S", value)
    with pytest.raises(ConfigError, match="KV_MEMORY_BLOBS_TIMEOUT_S"):
        Store.open(tmp_path / "store", blobs=f"s3://{services.BUCKET}/x")


def test_limits_survive_an_outage(behind: Store, proxy: Proxy) -> None:
    limits = replace(behind.limits(), max_size_bytes=10**6)
    proxy.fail("500")
    behind.set_limits(limits)
    assert behind.limits() == limits
