from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kv_memory import KVMemory
from kv_memory.serve.app import create_app
from kv_memory.serve.keys import Keys
from kv_memory.serve.server import Server, listen
from kv_memory.serve.settings import ServeSettings
from tests.memories import FERRY, LAMP, open_memory, wide_backbone
from tests.serve.running import Running


@contextmanager
def running(memory: KVMemory, settings: ServeSettings, *, loopback: bool = True) -> Iterator[Running]:
    """A real server on a free port, in a thread."""
    listening = listen("127.0.0.1", 0, Keys(memory.store))
    app, ready = create_app(memory, settings, loopback=loopback), threading.Event()
    server = Server(app, settings, on_ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    made = Running(f"http://127.0.0.1:{listening.getsockname()[1]}", memory, app, server, thread)
    try:
        assert ready.wait(30)
        yield made
    finally:
        made.stop()
        listening.close()


@pytest.fixture
def serve(tmp_path: Path, wide: Any, _two_documents: Path) -> Iterator[Callable[..., Running]]:
    """Start servers of their own on a copy of the two documents; options are those of `ServeSettings`."""
    with ExitStack() as stack:

        def start(*, backbone: Any = None, loopback: bool = True, **options: Any) -> Running:
            path = tmp_path / "store"
            if not path.exists():
                shutil.copytree(_two_documents, path)
            memory = stack.enter_context(open_memory(path, backbone or wide))
            settings = ServeSettings(**{"default_tokens": 4, "stop_timeout_s": 5, **options})
            return stack.enter_context(running(memory, settings, loopback=loopback))

        yield start


@pytest.fixture(scope="package")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests that change nothing: two documents in `default`, one in `team`."""
    with open_memory(tmp_path_factory.mktemp("shared") / "store", wide_backbone(), keep_text=True) as memory:
        memory.add([("ferry", FERRY), ("lamp", LAMP, {"year": 1921})])
        memory.in_collection("team").add([("walrus", "The walrus sleeps on the ice near the kettle.")])
        with running(memory, ServeSettings(default_tokens=4, max_tokens=64)) as server:
            yield server


@pytest.fixture(scope="package")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server for requests made at random."""
    with open_memory(tmp_path_factory.mktemp("fuzzed") / "store", wide_backbone(), keep_text=True) as memory:
        memory.add([("0", FERRY), ("lamp", LAMP)])
        with running(memory, ServeSettings(default_tokens=2, max_tokens=8)) as server:
            yield server


@pytest.fixture
def http(shared: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared.url, timeout=30) as client:
        yield client
