"""Bad input: a clear error in OpenAI's shape, with the right status."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kv_memory import errors
from kv_memory.serve.app import create_app
from kv_memory.serve.errors import describe
from kv_memory.serve.settings import ServeSettings
from tests.memories import open_memory, wide_backbone
from tests.serve.conftest import running
from tests.serve.running import MODEL, Running, error_of

USER = {"role": "user", "content": "Why?"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}
# Fields of a chat request, the status, and a part of the message.
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": ({"model": "gpt-4"}, 404, "/v1/models"),
    "unknown collection": ({"model": f"{MODEL}/nothing"}, 404, "collection 'nothing'"),
    "two collections": ({"model": f"{MODEL}/team", "kv_memory": {"collection": "default"}}, 400, "'team'"),
    "unknown field": ({"temprature": 1}, 400, "temprature"),
    "unknown field of kv_memory": ({"kv_memory": {"colection": "x"}}, 400, "kv_memory.colection"),
    "unknown document": ({"kv_memory": {"document_ids": ["ferry", "nothing"]}}, 404, "nothing"),
    "no documents": ({"kv_memory": {"document_ids": []}}, 400, "document_ids"),
    "a number as text": ({"temperature": "0.5"}, 400, "temperature"),
    "a bool as number": ({"max_tokens": True}, 400, "max_tokens"),
    "no messages": ({"messages": []}, 400, "messages"),
    "messages as text": ({"messages": "Why?"}, 400, "messages"),
    "too hot": ({"temperature": 3}, 400, "temperature"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "too many tokens": ({"max_tokens": 65}, 400, "64"),
    "a seed of 80 bits": ({"seed": 2**80}, 400, "seed"),
    "an unknown role": ({"messages": [{"role": "owner", "content": "x"}]}, 400, "role"),
    "the last turn is the assistant's": ({"messages": [USER, {"role": "assistant", "content": "x"}]}, 400, "user turn"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "content"),
    "half a surrogate pair": ({"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "surrogate"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "'tools' is not supported"),
    "a forced tool": ({"tool_choice": "required"}, 400, "tool_choice"),
    "functions": ({"functions": [{"name": "f"}]}, 400, "functions"),
    "a tool call": ({"messages": [{"role": "assistant", "tool_calls": [CALL]}, USER]}, 400, "tool calls"),
    "a tool's result": ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, 400, "tool calls"),
    "an image": ({"messages": [IMAGE]}, 400, "image_url"),
    "several answers": ({"n": 2}, 400, "'n' is not supported"),
    "logprobs": ({"logprobs": True}, 400, "logprobs"),
    "penalties": ({"frequency_penalty": 1.0}, 400, "frequency_penalty"),
    "biases": ({"logit_bias": {"5": 10}}, 400, "logit_bias"),
    "sound": ({"modalities": ["text", "audio"]}, 400, "modalities"),
    "a schema without a schema": ({"response_format": {"type": "json_schema"}}, 400, "json_schema"),
    "an impossible schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
        400,
        "JSON schema",
    ),
    "a prompt longer than the window": (
        {"messages": [{"role": "user", "content": "word " * 2000}]},
        400,
        "positions|context",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_requests(http: httpx.Client, name: str, stream: bool) -> None:
    fields, status, says = BAD[name]
    body = {"model": MODEL, "messages": [USER], "stream": stream, **fields}
    done = http.post("/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert done.status_code == status, done.text
    error = error_of(done)
    assert re.search(says, error["message"]), error
    assert error["type"] == "invalid_request_error" and error["code"]


def test_a_window_that_is_too_small_has_the_code_that_clients_look_for(http: httpx.Client) -> None:
    fields, _, _ = BAD["a prompt longer than the window"]
    assert error_of(http.post("/v1/chat/completions", json={"model": MODEL, **fields}))["code"] == (
        "context_length_exceeded"
    )


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", "/v1/chat/completions", {"content": b"{", "headers": {"Content-Type": "application/json"}}, 400),
        ("POST", "/v1/chat/completions", {"content": b"[]", "headers": {"Content-Type": "application/json"}}, 400),
        (
            "POST",
            "/v1/chat/completions",
            {"content": b'{"model": "x"}', "headers": {"Content-Type": "text/plain"}},
            400,
        ),
        ("POST", "/v1/chat/completions", {"content": b"{" * 200_000}, 400),
        ("POST", "/v1/completions", {"json": {"model": MODEL, "prompt": [1, 2]}}, 400),
        ("POST", "/v1/completions", {"json": {"model": MODEL, "prompt": ["a", "b"]}}, 400),
        ("POST", "/v1/completions", {"json": {"model": MODEL, "prompt": "a", "echo": True}}, 400),
        ("POST", "/v1/embeddings", {"json": {"model": MODEL, "input": "a"}}, 404),
        ("GET", "/v1/documents?limit=0", {}, 400),
        ("GET", "/v1/documents?collection=nothing", {}, 404),
        ("GET", "/v1/documents/nothing", {}, 404),
        ("DELETE", "/v1/documents/..%2F..%2Fetc%2Fpasswd", {}, 404),
        ("DELETE", "/v1/documents/a%00b", {}, 404),
        ("POST", "/v1/documents/files", {"data": {"wait": "true"}}, 400),
        ("GET", "/v1/nothing", {}, 404),
        ("GET", "/v1/chat/completions", {}, 405),
        ("PUT", "/v1/models", {}, 405),
    ],
)
def test_every_error_has_the_shape_of_openai(
    http: httpx.Client, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    done = http.request(method, path, **options)
    assert done.status_code == status, done.text
    error_of(done)


def test_a_prompt_of_10_mb_is_413_and_the_next_request_is_answered(http: httpx.Client, shared: Running) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 10_000_000}]}
    done = http.post("/v1/chat/completions", json=body)
    assert done.status_code == 413 and error_of(done)["code"] == "body_too_large"

    def endless() -> Any:  # without a length that could be refused at once
        for _ in range(200):
            yield b"x" * 2**16

    # The connection may be closed while it still sends.
    with httpx.Client(timeout=30) as client, contextlib.suppress(httpx.WriteError):
        assert client.post(f"{shared.url}/v1/chat/completions", content=endless()).status_code == 413
    assert shared.chat(max_tokens=1).status_code == 200


def test_a_long_prompt_within_the_body_limit_is_refused_by_the_window(serve: Callable[..., Running]) -> None:
    done = serve().chat("word " * 100_000)
    assert done.status_code == 400 and error_of(done)["code"] == "context_length_exceeded"


def test_a_foreign_store_is_409_with_both_fingerprints(tmp_path: Path, _two_documents: Path) -> None:
    path = Path(shutil.copytree(_two_documents, tmp_path / "store"))
    with open_memory(path, wide_backbone("qwen2")) as memory, running(memory, ServeSettings()) as server:
        name = server.get("/v1/models").json()["data"][0]["id"]
        done = server.chat(model=name, kv_memory={})
    assert done.status_code == 409
    error = error_of(done)
    assert error["code"] == "fingerprint_mismatch"
    assert "is llama in the cache, qwen2 loaded" in error["message"], error["message"]


def test_every_error_of_the_package_has_a_status() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]
    for kind in kinds:
        status, body = describe(kind("what happened", where="/secret", next_step="Do this."))
        assert 400 <= status < 600 and "what happened" in body.message
        assert status < 500 or "/secret" not in body.message, kind


def test_an_unexpected_error_is_500_without_its_details(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(type(server.memory), "retrieve", fail)
    done = server.chat(kv_memory={})
    assert done.status_code == 500 and "secret" not in done.text
    error_of(done)


def test_the_schema_names_every_error(memory: Any) -> None:
    schema = create_app(memory).openapi()
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert "422" not in operation["responses"], path
