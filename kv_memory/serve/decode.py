"""Answers on their way to a client: decoded at the model's pace, sent at the client's, stopped when the client is gone.

The two paces are kept apart by a queue, which the length limit of an answer bounds. A client that takes one byte a
minute holds a connection, and never a place among the answers that are decoded together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kv_memory.errors import QueueFullError
from kv_memory.generate import Answer, AnswerStream, iterate_in_thread
from kv_memory.serve.errors import ErrorResponse, describe
from kv_memory.serve.metrics import Metrics
from kv_memory.serve.settings import ServeSettings

_T = TypeVar("_T")
_BEAT_S = 15.0  # a comment is sent after this time without a token, so that no proxy takes the connection for dead


class ClientGoneError(Exception):
    """The client has disconnected; nobody will see the response."""


class Gate:
    """The requests in progress, and the limit on them."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self._most = settings.max_batch + settings.max_queue
        self._metrics = metrics
        self._n = 0

    def enter(self) -> None:
        """Take a place; a `QueueFullError` if all are taken."""
        if self._n >= self._most:
            raise QueueFullError(
                f"{self._n} requests are in progress, which is as many as this server admits",
                next_step="Try again in a few seconds, or raise --max-queue.",
            )
        self._n += 1
        self._metrics.in_progress.set(self._n)

    def leave(self) -> None:
        """Return the place."""
        self._n -= 1
        self._metrics.in_progress.set(self._n)


class Decoding:
    """One answer in progress. It holds a place of the gate until `close`.

    Args:
        start: Function that starts the answer; it runs in a thread.
        started_s: Time of the request's arrival, by `time.perf_counter`.
    """

    def __init__(self, start: Callable[[], AnswerStream], gate: Gate, metrics: Metrics, *, started_s: float) -> None:
        self._start = start
        self._gate = gate
        self._metrics = metrics
        self._started_s = started_s
        self._stream: AnswerStream | None = None
        self._held = False
        self.ttft_s = 0.0

    async def begin(self) -> None:
        """Start the answer: find its documents, load their caches. What is wrong with the request is raised here."""
        self._gate.enter()
        self._held = True
        starting = asyncio.ensure_future(asyncio.to_thread(self._start))
        try:
            self._stream = await asyncio.shield(starting)
        except BaseException:
            if not starting.done():  # cancelled, and a thread cannot be: close what it is about to start
                starting.add_done_callback(_close_started)
            await self.close()
            raise

    async def pieces(self) -> AsyncIterator[str]:
        """The pieces of the answer; cancelling it stops decoding within a token."""
        assert self._stream is not None
        async for piece in iterate_in_thread(self._stream):
            if not self.ttft_s:
                self.ttft_s = time.perf_counter() - self._started_s
                self._metrics.ttft_s.observe(self.ttft_s)
            yield piece

    async def run(self) -> Answer:
        """The whole answer."""
        async for _ in self.pieces():
            pass
        return self.answer

    @property
    def answer(self) -> Answer:
        """The answer as far as it is decoded."""
        assert self._stream is not None
        return self._stream.answer

    async def close(self) -> None:
        """Stop decoding, count its tokens and return the place."""
        stream, self._stream = self._stream, None
        held, self._held = self._held, False
        if held:
            self._gate.leave()
        if stream is not None:
            await asyncio.to_thread(stream.close)
            self._metrics.count(stream.answer)


def _close_started(starting: asyncio.Future[AnswerStream]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().close()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of some work, which is cancelled when the client disconnects.

    Raises:
        ClientGoneError: The client has disconnected.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer as server-sent events.

    Args:
        decoding: The answer, begun.
        on_piece: Data of the event for a piece.
        on_end: Data of the last events.
        client_timeout_s: Longest time in seconds that the client may leave the connection full.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        decoding: Decoding,
        *,
        on_piece: Callable[[str], str],
        on_end: Callable[[Answer], list[str]],
        client_timeout_s: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._decoding = decoding
        self._on_piece = on_piece
        self._on_end = on_end
        self._timeout_s = client_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; ends early if the client is gone or too slow, and the server then drops the connection."""
        events: asyncio.Queue[str | None] = asyncio.Queue()
        decoder = asyncio.ensure_future(self._decode(events))
        try:
            await unless_gone(receive, self._send(events, send))
        except (ClientGoneError, TimeoutError):
            pass
        finally:
            decoder.cancel()
            await asyncio.gather(decoder, return_exceptions=True)
            await self._decoding.close()

    async def _decode(self, events: asyncio.Queue[str | None]) -> None:
        try:
            async for piece in self._decoding.pieces():
                events.put_nowait(self._on_piece(piece))
            for event in self._on_end(self._decoding.answer):
                events.put_nowait(event)
            events.put_nowait("[DONE]")
        except Exception as error:  # the status is sent already: clients know an error by the field of an event
            _, body = describe(error)
            events.put_nowait(ErrorResponse(error=body).model_dump_json())
        finally:
            events.put_nowait(None)
            await self._decoding.close()  # the place is free for others, however slowly the client takes the rest

    async def _send(self, events: asyncio.Queue[str | None], send: Send) -> None:
        await self._within(send({"type": "http.response.start", "status": 200, "headers": self.raw_headers}))
        while True:
            try:
                event = await asyncio.wait_for(events.get(), _BEAT_S)
                if event is None:
                    break
                body = f"data: {event}\n\n"
            except TimeoutError:
                body = ": waiting\n\n"
            await self._within(send({"type": "http.response.body", "body": body.encode(), "more_body": True}))
        await self._within(send({"type": "http.response.body", "body": b"", "more_body": False}))

    async def _within(self, sending: Awaitable[None]) -> None:
        async with asyncio.timeout(self._timeout_s):
            await sending
