"""Hosts, origins, slow and absent clients, full queues, and the end of a server."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from kv_memory.serve import chat
from tests.memories import FERRY_QUESTION
from tests.serve.running import MODEL, Running, error_of, events

Serve = Callable[..., Running]


def in_progress(server: Running) -> int:
    service: Any = server.app.state.service
    return int(service.gate._n)


def until(true: Callable[[], bool], *, within_s: float = 10) -> None:
    end_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Running, float], list[float]]:
    """Make every token of a server take a while; returns the times of the tokens."""

    def make(server: Running, pause_s: float) -> list[float]:
        backbone, times = server.memory.backbone, []
        whole = type(backbone).logits

        def logits(self: Any, *args: Any, **options: Any) -> Any:
            times.append(time.monotonic())
            time.sleep(pause_s)
            return whole(self, *args, **options)

        monkeypatch.setattr(type(backbone), "logits", logits)
        return times

    return make


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example.com"}, 403),
        ({"Host": "127.0.0.1.evil.com:80"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Origin": "https://evil.example.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[", "Host": "localhost"}, 403),
        ({"Origin": "http://localhost:3000", "Host": "localhost:8000"}, 200),
    ],
)
def test_pages_in_a_browser_cannot_use_the_server(http: httpx.Client, headers: dict[str, str], status: int) -> None:
    done = http.get("/v1/models", headers=headers)
    assert done.status_code == status
    if status != 200:
        error_of(done)
    assert "access-control-allow-origin" not in done.headers


def test_hosts_and_origins_can_be_allowed(serve: Serve) -> None:
    server = serve(allowed_hosts="kv.example.com, localhost", allowed_origins="https://chat.example.com")
    assert server.get("/v1/models", headers={"Host": "KV.example.com:443"}).status_code == 200
    assert server.get("/v1/models", headers={"Host": "127.0.0.1"}).status_code == 403
    page = {"Host": "kv.example.com", "Origin": "https://chat.example.com"}
    allowed = server.get("/v1/models", headers=page)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example.com"
    asked = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = httpx.options(f"{server.url}/v1/chat/completions", headers=asked)
    assert preflight.status_code == 200


def test_a_full_queue_is_429_and_its_places_come_back(serve: Serve, slow: Any) -> None:
    server = serve(max_batch=1, max_queue=1)
    slow(server, 0.05)
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: server.chat(FERRY_QUESTION, max_tokens=8), range(8)))
    statuses = sorted(each.status_code for each in done)
    assert statuses[0] == 200 and statuses[-1] == 429 and set(statuses) == {200, 429}
    refused = next(each for each in done if each.status_code == 429)
    assert error_of(refused)["code"] == "rate_limit_exceeded" and int(refused.headers["retry-after"]) > 0
    until(lambda: in_progress(server) == 0)
    assert server.chat(max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_disconnects_stops_decoding_within_a_token(serve: Serve, slow: Any, stream: bool) -> None:
    server = serve()
    times = slow(server, 0.1)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 200, "stream": stream}
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        until(lambda: len(times) > 2)
    gone_s, n = time.monotonic(), len(times)
    until(lambda: in_progress(server) == 0, within_s=2)
    assert time.monotonic() - gone_s < 1
    time.sleep(0.3)
    assert len(times) <= n + 2


def test_an_answer_that_takes_too_long_is_504_or_an_event(serve: Serve, slow: Any) -> None:
    server = serve(request_timeout_s=0.3)
    slow(server, 0.1)
    done = server.chat(max_tokens=100)
    assert done.status_code == 504 and error_of(done)["code"] == "timeout"
    streamed = server.chat(max_tokens=100, stream=True)
    assert streamed.status_code == 200
    last = [line for line in streamed.text.splitlines() if line.startswith("data:")][-1]
    assert '"code":"timeout"' in last
    until(lambda: in_progress(server) == 0)


def test_a_client_that_sends_one_byte_a_minute_is_408(serve: Serve) -> None:
    server = serve(client_timeout_s=0.3)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as client:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        client.sendall(head)
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer
    assert in_progress(server) == 0


def test_a_client_that_reads_one_byte_a_minute_holds_no_place_and_is_dropped(serve: Serve, slow: Any) -> None:
    # Each chunk is made large, so that buffers of the kernel do not hide that nobody reads.
    server = serve(client_timeout_s=0.5, max_tokens=4096)
    piece = chat._Form.piece
    chat._Form.piece = lambda self, text: piece(self, text) + " " * 2**17  # type: ignore[method-assign]
    try:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            body = {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 200}
            content = json.dumps({**body, "stream": True}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            until(lambda: in_progress(server) == 1)
            # Others are answered meanwhile, and the place is free before the client has taken its answer.
            assert server.chat(max_tokens=2).status_code == 200
            until(lambda: in_progress(server) == 0)
            time.sleep(1)
            taken = b""
            while part := client.recv(2**20):
                taken += part
            assert b"chat.completion.chunk" in taken and b"[DONE]" not in taken
    finally:
        chat._Form.piece = piece  # type: ignore[method-assign]


def test_running_requests_end_and_new_ones_are_refused_when_it_stops(serve: Serve, slow: Any) -> None:
    server = serve()
    slow(server, 0.05)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: server.chat(max_tokens=20, stream=True))
        until(lambda: in_progress(server) == 1)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        time.sleep(0.3)
        with pytest.raises(httpx.TransportError):
            server.get("/healthz")
        assert events(running.result().text.splitlines())[-1]["choices"][0]["finish_reason"] == "length"
        stopping.join()


def test_requests_that_do_not_end_are_cancelled_when_it_stops(serve: Serve, slow: Any) -> None:
    server = serve(stop_timeout_s=1)
    times = slow(server, 0.1)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: server.chat(max_tokens=2000, stream=True))
        until(lambda: len(times) > 2)
        begun_s = time.monotonic()
        server.stop()
        assert time.monotonic() - begun_s < 5
        with pytest.raises(httpx.TransportError):
            running.result()
    assert in_progress(server) == 0


def test_health_and_metrics(serve: Serve) -> None:
    server = serve()
    assert server.get("/healthz").json() == {"status": "ok"}
    assert server.get("/readyz").json() == {"status": "ready"}
    server.chat(kv_memory={"top_k": 1}, max_tokens=3)
    server.get("/v1/nothing")
    text = server.get("/metrics").text
    assert 'kv_memory_http_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'kv_memory_http_requests_total{route="none",status="404"} 1.0' in text
    assert 'kv_memory_tokens_total{kind="completion"} 3.0' in text
    assert "kv_memory_ttft_seconds_count 1.0" in text and "kv_memory_answers_in_progress 0.0" in text
    assert 'kv_memory_documents{collection="default"} 2.0' in text
    service: Any = server.app.state.service
    service.jobs.stop()
    assert server.get("/readyz").status_code == 503
