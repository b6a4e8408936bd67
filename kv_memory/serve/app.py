"""The FastAPI application: its endpoints, its limits, and its beginning and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import kv_memory
from kv_memory.memory import KVMemory
from kv_memory.serve import chat, documents, errors, health
from kv_memory.serve.keys import Keys
from kv_memory.serve.limits import LOOPBACK_NAMES, Limits
from kv_memory.serve.service import Service
from kv_memory.serve.settings import ServeSettings

_SPARE_THREADS = 16  # for documents and listings, beside the answers


def create_app(memory: KVMemory, settings: ServeSettings | None = None, *, loopback: bool = True) -> FastAPI:
    """The application of a server.

    Args:
        memory: Memory with the server's own collection. Its model is loaded when the application starts; the caller
            closes it.
        settings: Limits.
        loopback: True if it can only be reached from this machine. It then needs no key until one is created, and
            accepts loopback names only.
    """
    settings = settings or ServeSettings()
    service = Service(memory, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Each answer waits in a thread for its next token, so the few threads of asyncio's own pool would be the limit.
        n_threads = settings.max_batch + settings.max_queue + _SPARE_THREADS
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(n_threads, thread_name_prefix="serve"))
        await asyncio.to_thread(memory.load)
        await asyncio.to_thread(lambda: memory.reader)
        service.jobs.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.jobs.stop)

    app = FastAPI(
        title="kv-memory",
        version=kv_memory.__version__,
        summary="Answers from distilled caches of documents, in OpenAI's API.",
        lifespan=lifespan,
        docs_url=None,  # their scripts come from a network of other people's
        redoc_url=None,
    )
    app.state.service = service
    app.state.keys = Keys(memory.store)
    app.state.open_to_all = loopback
    errors.install(app)
    for module in (chat, documents, health):
        app.include_router(module.router)
    if settings.origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.origins, allow_methods=["*"], allow_headers=["*"])
    hosts = settings.hosts or (LOOPBACK_NAMES if loopback else ())
    app.add_middleware(Limits, settings=settings, hosts=hosts, metrics=service.metrics)
    return app
