"""Ctrl-C wherever it falls while something is stored: it comes out as itself, and the store goes on in the process."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_samples import FINGERPRINT, document, make_cache, sha

from kv_memory.errors import StoreFullError, interruption_behind
from kv_memory.store import Store
from kv_memory.store.error_mapping import mapped
from kv_memory.store.sql.locks import FileLocks

Where = tuple[str, str, int]
# Python itself swallows what is raised in these: they are called back when something is freed.
_CALLED_BACK = {"remove", "_cleanup", "_fast_discard", "__del__", "_finalize_fairy"}


class _Watch:
    """Sees each place where Python looks for signals: a function begins, or C code has come back."""

    def __init__(self, at: Where | None = None) -> None:
        self.at = at
        self.seen: dict[Where, None] = {}

    def __call__(self, frame: types.FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in {"call", "c_return"} or code.co_name in _CALLED_BACK:
            return
        where = (event, f"{code.co_filename}:{code.co_name}", frame.f_lineno)
        self.seen[where] = None
        if where == self.at:
            sys.setprofile(None)
            raise KeyboardInterrupt

    def over(self, work: Callable[[], None]) -> str:
        """Run, and return what came out of it."""
        sys.setprofile(self)
        try:
            work()
        except BaseException as error:
            sys.setprofile(None)
            return type(error).__name__
        finally:
            sys.setprofile(None)
        return ""


def _keep(store: Store, name: str) -> None:
    with store.making(sha(name), FINGERPRINT, 0.25):
        if not store.has(sha(name), FINGERPRINT, 0.25):
            store.put(sha(name), make_cache(1))
    store.put_document(document(name, name))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file just opened, and let go
def test_ctrl_c_in_a_put_is_raised_and_leaves_no_lock(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        _keep(store, "first")  # what is cached by then is no longer part of it
        watch = _Watch()
        assert watch.over(lambda: _keep(store, "whole")) == ""
        places = [where for where in watch.seen if "/logging/" not in where[1]]
        assert len(places) > 300
        hit = 0
        for number, where in enumerate(places):
            name = f"text {number}"
            came = _Watch(where).over(lambda name=name: _keep(store, name))  # type: ignore[misc]
            assert came in {"KeyboardInterrupt", ""}, where
            hit += came != ""
            _keep(store, name)  # a lock that stayed behind would make it wait, then fail
            assert store.get(sha(name), FINGERPRINT, 0.25).n_tokens == 32, where
        assert hit > 0.9 * len(places)
        assert len(store.documents()) == len(places) + 2
        found = store.check()
        assert (found.damaged, found.misfiled, found.missing) == ((), (), ())
        store.gc()
        assert store.check().ok


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_while_locking_or_unlocking_frees_the_lock(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path / "locks")

    def hold() -> None:
        with locks.hold("name") as had:
            assert had

    watch = _Watch()
    watch.over(hold)
    assert len(watch.seen) > 10
    for where in watch.seen:
        _Watch(where).over(hold)
        other = threading.Thread(target=hold, daemon=True)
        other.start()
        other.join(5)
        assert not other.is_alive(), where


def test_an_error_caused_by_an_interruption_raises_the_interruption(tmp_path: Path) -> None:
    def trip(stop: BaseException, over: Exception) -> None:
        with mapped(tmp_path):
            try:
                raise stop
            finally:
                raise over

    with pytest.raises(KeyboardInterrupt) as caught:
        trip(KeyboardInterrupt(), AssertionError())
    assert isinstance(caught.value.__cause__, AssertionError)
    with pytest.raises(SystemExit) as left:
        trip(SystemExit(3), AssertionError())
    assert left.value.code == 3
    with pytest.raises(AssertionError):
        trip(ValueError(), AssertionError())
    with pytest.raises(AssertionError):  # a generator that is closed was not interrupted
        trip(GeneratorExit(), AssertionError())
    with pytest.raises(StoreFullError):  # what users can act on is said
        trip(KeyboardInterrupt(), StoreFullError("no space left"))


def test_interruption_behind_searches_the_whole_chain() -> None:
    try:
        try:
            try:
                raise KeyboardInterrupt
            finally:
                raise AssertionError
        except AssertionError as error:
            raise ValueError from error
    except ValueError as error:
        assert isinstance(interruption_behind(error), KeyboardInterrupt)
    assert interruption_behind(ValueError()) is None
