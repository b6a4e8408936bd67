"""A server that runs during a test."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI

from kv_memory import KVMemory
from kv_memory.serve.server import Server

MODEL = "tiny-llama"


@dataclass(frozen=True)
class Running:
    """A server that runs during a test."""

    url: str
    memory: KVMemory
    app: FastAPI
    server: Server
    thread: threading.Thread

    def stop(self) -> None:
        """Stop as on SIGTERM."""
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=30, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30, **options)

    def chat(self, text: str = "When does the ferry leave?", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        headers = fields.pop("headers", None)
        return self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, **fields}, headers=headers)


def events(lines: Iterable[str]) -> list[Any]:
    """The events of a stream, which must end with `[DONE]`."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, which must have OpenAI's shape."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["type"]
    error: dict[str, Any] = body["error"]
    return error
