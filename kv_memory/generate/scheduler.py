"""Scheduler: decodes the requests of one model together, token by token.

It has no thread of its own ("leader and followers"). Whoever wants the next piece of an answer and finds none leads:
runs one step for all requests and leaves each its piece. The others wait until they have one, or shall lead the next
step. An answer that is alone is thus decoded in its caller's thread, with its traceback and its Ctrl-C. Nothing is to
be started or stopped, nothing outlives its callers, and a process can be forked. A background thread was rejected: it
would need all of that, and its own rules for exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial

import torch

from kv_memory.config import check_at_least
from kv_memory.errors import DecodeFailedError, QueueFullError
from kv_memory.generate.answer import Answer
from kv_memory.generate.request import Request
from kv_memory.model.kv_cache import PositionedCache

MAX_BATCH = 16
MAX_QUEUE = 256
CHUNK_TOKENS = 512  # prompt tokens a step, so that a long prompt does not keep the others from decoding
ALONE_TOKENS = 1024  # of a prompt that is alone, so that one that comes meanwhile does not wait for all of it
_Row = tuple[Request, list[int]]  # a request and its tokens in a step


class Scheduler:
    """Decodes requests together: they join and leave between tokens. Safe to use from threads and asyncio.

    Requests are decoded first come, first served, at most `max_batch` in a step. One whose pieces nobody takes is
    paused, and takes nobody's place.

    Args:
        max_batch: Largest number of requests decoded in one step.
        max_queue: Largest number of further requests that wait for their turn.

    Raises:
        ConfigError: `max_batch` is below 1, or `max_queue` below 0.
    """

    def __init__(self, *, max_batch: int = MAX_BATCH, max_queue: int = MAX_QUEUE) -> None:
        self.max_batch, self.max_queue = max_batch, max_queue
        check_at_least(self, 1, "max_batch")
        check_at_least(self, 0, "max_queue")
        self._forget()

    def _forget(self) -> None:
        """Begin without any request, as in a forked child."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._requests: list[Request] = []  # in the order of their arrival
        self._leader: Request | None = None
        self._step: list[_Row] = []  # the step that the leader runs, or is about to run
        self._running = False

    def check_room(self) -> None:
        """Raise a `QueueFullError` if the queue is full."""
        self._check_fork()
        with self._lock:
            self._check_room()

    @property
    def is_full(self) -> bool:
        """Whether a request that joins now would have to wait for its turn."""
        with self._lock:
            return self._n_ready() >= self.max_batch

    def _n_ready(self) -> int:
        return sum(not (one.over or one.paused) for one in self._requests)

    def _check_room(self) -> None:
        if self._n_ready() >= self.max_batch + self.max_queue:
            raise QueueFullError(
                f"{self.max_batch} requests are being answered, and {self.max_queue} wait",
                where="max_queue",
                next_step="Ask again later, or allow a longer queue (max_queue of KVMemory.open).",
            )

    def join(self, request: Request) -> None:
        """Put a request at the end of the queue.

        Raises:
            QueueFullError: The queue is full.
        """
        self._check_fork()
        with self._lock:
            self._check_room()
            self._requests.append(request)

    def leave(self, request: Request) -> None:
        """Decode no more of a request."""
        self._check_fork()
        request.end()
        with self._lock:
            self._wake()

    def next_piece(self, request: Request) -> str | None:
        """The next piece of an answer, which may be empty; None at its end. Raises what ended it early.

        Raises:
            DecodeTimeoutError: Decoding takes longer than `DecodeSettings.timeout_s`, counted from the call.
            DecodeFailedError: A step with this request and others was interrupted, or failed.
        """
        try:
            while True:
                turn = self._turn(request)
                if isinstance(turn, Future):
                    with contextlib.suppress(TimeoutError):
                        turn.result(self._patience_s(request))
                elif callable(turn):
                    turn()
                else:
                    return turn
        except BaseException:
            self._let_go(request)
            raise

    async def anext_piece(self, request: Request) -> str | None:
        """`next_piece` for asyncio: a step runs in a thread, and waiting takes none.

        A step cannot be interrupted: cancelling waits for its end.
        """
        try:
            while True:
                turn = self._turn(request)
                if isinstance(turn, Future):
                    await asyncio.wait([asyncio.wrap_future(turn)], timeout=self._patience_s(request))
                elif callable(turn):
                    work = asyncio.ensure_future(asyncio.to_thread(turn))
                    try:
                        await asyncio.shield(work)
                    finally:
                        if not work.done():
                            await asyncio.wait([work])
                else:
                    return turn
        except BaseException:
            self._let_go(request)
            raise

    def answers(self, starts: Iterable[Callable[[], Request]]) -> list[Answer]:
        """Decode several requests to their ends; at most `max_batch` of them are begun at a time."""
        begun: list[Request] = []
        try:
            for start in starts:
                if len(begun) >= self.max_batch:
                    self.finish(begun[len(begun) - self.max_batch])
                begun.append(start())
                begun[-1].ahead = math.inf
                self.join(begun[-1])
            return [self.finish(request) for request in begun]
        finally:
            for request in begun:
                if not request.over:
                    self.leave(request)

    def finish(self, request: Request) -> Answer:
        """Decode a request to its end."""
        request.ahead = math.inf
        while self.next_piece(request) is not None:
            pass
        return request.answer

    # -- whose turn it is ------------------------------------------------------------------------------------------

    def _turn(self, request: Request) -> str | Future[None] | Callable[[], None] | None:
        """A piece of the request, None at its end, something to wait for, or a step to run."""
        self._check_fork()
        with self._lock:
            over = request.over  # looked at first: the last piece is there before it
            if request.pieces:
                return request.pieces.popleft()
            if not over and all(one is not request for one, _ in self._step):
                request.check_time()
                over = request.over
            if over:
                error, request.error = request.error, None
                if error is not None:
                    raise error
                return None
            if request not in self._requests:  # it came over a fork
                self._requests.append(request)
            if self._leader is None and (step := self._next_step()):
                self._leader, self._step = request, step
                return partial(self._lead, request, step)
            if request.waiter is None:
                request.waiter = Future()
                request.waiter.set_running_or_notify_cancel()  # asyncio would cancel it together with its task
            return request.waiter

    def _next_step(self) -> list[_Row]:
        """The requests that are next, each with its tokens."""
        ready: list[Request] = []
        for request in self._requests:
            request.check_time()
            if not (request.over or request.paused):
                ready.append(request)
                if len(ready) == self.max_batch:
                    break
        left, step = CHUNK_TOKENS, []
        for request in ready:
            ids = request.next_ids(left if len(ready) > 1 else ALONE_TOKENS)
            left -= len(ids) if len(ids) > 1 else 0
            if ids:
                step.append((request, ids))
        return step

    def _lead(self, leader: Request, step: list[_Row]) -> None:
        """Run a step; its errors end the requests in it. An interruption is raised as well."""
        try:
            with self._lock:
                if self._step is not step:  # the leader was cancelled before this thread was there
                    return
                self._running = True
            self._run(step)
        except BaseException as error:
            for request, _ in step:
                if request is leader:
                    request.end(error if isinstance(error, Exception) else None)
                elif not request.over:
                    failed = DecodeFailedError(
                        "a forward pass with this request and others failed or was interrupted",
                        where=f"{type(error).__name__}: {error}"[:200],
                        next_step="Ask again.",
                    )
                    failed.__cause__ = error
                    request.end(failed)
            if not isinstance(error, Exception):
                raise
        finally:
            with self._lock:
                if self._step is step:
                    self._leader, self._step, self._running = None, [], False
                self._wake()

    @torch.no_grad()
    def _run(self, step: list[_Row]) -> None:
        taken: list[tuple[Request, PositionedCache, list[int]]] = []
        for request, ids in step:
            try:
                cache = request.cache()
            except Exception as error:  # composing failed
                request.end(error)
                continue
            if cache is not None:  # it was not closed meanwhile
                taken.append((request, cache, ids))
        if not taken:
            return
        logits = taken[0][0].backbone.packed_logits([(ids, cache) for _, cache, ids in taken])
        likeliest = logits.argmax(-1).tolist()  # once for all: each look at a result stalls a GPU
        for (request, _, ids), row, token in zip(taken, logits, likeliest, strict=True):
            try:
                request.prefilled(len(ids), row, token)
            except Exception as error:  # of this request alone, e.g. of its JSON schema
                request.end(error)

    def _let_go(self, request: Request) -> None:
        """Wait no more, and let another one lead; a step that runs goes on to its end."""
        with self._lock:
            _notify(request)
            if self._leader is request and not self._running:
                self._leader, self._step = None, []
            self._wake()

    def _wake(self) -> None:
        """Wake all who have news, and one who leads the next step."""
        self._requests = [one for one in self._requests if one.waiter is not None or not one.over]
        sleeping = None
        for request in self._requests:
            if request.waiter is not None and (request.pieces or request.over):
                _notify(request)
            elif request.waiter is not None and sleeping is None:
                sleeping = request
        if self._leader is None and sleeping is not None:
            _notify(sleeping)

    def _patience_s(self, request: Request) -> float | None:
        """Seconds to wait before the time limit is looked at; None to wait for the end of a step with this request."""
        left_s = request.left_s()
        stepping = any(one is request for one, _ in list(self._step))
        return None if left_s is None or stepping else max(0.0, left_s)

    def _check_fork(self) -> None:
        if os.getpid() == self._pid:
            return
        # In a forked child the lock may be held by a thread that does not exist, and the step that ran is half done.
        for request, _ in self._step:
            request.end(DecodeFailedError("the process was forked during a forward pass", next_step="Ask again."))
        for request in self._requests:
            request.waiter = None
        self._forget()


def _notify(request: Request) -> None:
    waiter, request.waiter = request.waiter, None
    if waiter is not None:
        waiter.set_result(None)
