"""Clients that people use, unchanged: openai, LangChain's ChatOpenAI, LlamaIndex's OpenAILike, Open WebUI's calls."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

from tests.memories import FERRY_QUESTION, LAMP_QUESTION
from tests.serve.running import MODEL, Running, events

WITH = f"{MODEL}/default"


@pytest.fixture
def client(shared: Running) -> Any:
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def turn(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_openai(client: Any) -> None:
    done = client.chat.completions.create(
        model=MODEL, messages=turn(LAMP_QUESTION), max_tokens=5, extra_body={"kv_memory": {"document_ids": ["lamp"]}}
    )
    assert done.choices[0].finish_reason == "length" and done.usage.completion_tokens == 5
    assert done.usage.prompt_tokens_details.cached_tokens > 0
    assert done.kv_memory["sources"][0]["document_id"] == "lamp"
    assert [model.id for model in client.models.list()] == [MODEL, WITH, f"{MODEL}/team"]
    text = client.completions.create(model=MODEL, prompt="Once", max_tokens=3)
    assert text.usage.completion_tokens == 3 and isinstance(text.choices[0].text, str)


def test_openai_streams(client: Any) -> None:
    whole = client.chat.completions.create(model=WITH, messages=turn(LAMP_QUESTION), max_tokens=8)
    stream = client.chat.completions.create(
        model=WITH, messages=turn(LAMP_QUESTION), max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].kv_memory["sources"] == whole.kv_memory["sources"]


async def test_openai_in_asyncio(shared: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{shared.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model=WITH, messages=turn(FERRY_QUESTION), max_tokens=3, stream=True
        )
        assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "length"


def test_errors_become_those_of_openai(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=turn("x"))
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="tools") as refused:
        client.chat.completions.create(
            model=MODEL, messages=turn("x"), tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
        )
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=MODEL, messages=turn("x" * 5000))
    assert long.value.code == "context_length_exceeded"


def test_an_error_in_a_stream_is_raised(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(request_timeout_s=0.000001)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model=MODEL, messages=turn("x"), max_tokens=50, stream=True)
        with pytest.raises(openai.APIError, match="not complete after"):
            list(stream)


def test_langchain(shared: Running) -> None:
    chat = ChatOpenAI(
        model=WITH, base_url=f"{shared.url}/v1", api_key="none", max_tokens=6, max_retries=0, temperature=0
    )
    whole = chat.invoke(LAMP_QUESTION)
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] == 6
    assert whole.usage_metadata["input_token_details"]["cache_read"] > 0
    pieces = list(chat.stream(LAMP_QUESTION, stream_usage=True))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == 6
    chosen = chat.bind(extra_body={"kv_memory": {"document_ids": ["ferry"]}})
    assert chosen.invoke(LAMP_QUESTION).content != whole.content


def test_langchain_structures_answers(shared: Running) -> None:
    chat = ChatOpenAI(model=MODEL, base_url=f"{shared.url}/v1", api_key="none", max_tokens=40, max_retries=0)
    schema = {
        "title": "Verdict",
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    found = chat.with_structured_output(schema, method="json_schema", strict=True).invoke("Is it?")
    assert isinstance(found, dict) and isinstance(found["ok"], bool)


@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "completion"])
def test_llama_index(shared: Running, is_chat: bool) -> None:
    llm = OpenAILike(
        model=WITH,
        api_base=f"{shared.url}/v1",
        api_key="none",
        is_chat_model=is_chat,
        max_tokens=6,
        max_retries=0,
        temperature=0,  # its default samples
    )
    whole = llm.complete(LAMP_QUESTION)
    assert whole.raw.kv_memory["sources"][0]["document_id"] == "lamp"
    assert "".join(piece.delta or "" for piece in llm.stream_complete(LAMP_QUESTION)) == whole.text
    if is_chat:
        replied = llm.chat([ChatMessage(role="system", content="Be brief."), ChatMessage(content=LAMP_QUESTION)])
        assert replied.raw.usage.completion_tokens == 6


def test_open_webui(shared: Running) -> None:
    """As its backend calls: models; a streamed chat by the model's id alone; a title in between, not streamed."""
    headers = {"Authorization": "Bearer none", "Content-Type": "application/json", "X-OpenWebUI-User-Name": "a"}
    with httpx.Client(base_url=f"{shared.url}/v1", headers=headers, timeout=30) as webui:
        ids = [model["id"] for model in webui.get("/models").json()["data"]]
        assert WITH in ids
        body: dict[str, Any] = {"stream": True, "model": WITH, "stream_options": {"include_usage": True}}
        body |= {"messages": turn(LAMP_QUESTION), "max_tokens": 5}
        first = events(webui.post("/chat/completions", json=body).text.splitlines())
        said = "".join(each["choices"][0]["delta"].get("content", "") for each in first if each["choices"])
        assert first[-1]["usage"]["completion_tokens"] == 5
        assert first[-2]["kv_memory"]["sources"][0]["document_id"] == "lamp"
        history = [*body["messages"], {"role": "assistant", "content": said}]
        task = f"### Task:\nGenerate a concise title.\n<chat_history>\n{json.dumps(history)}\n</chat_history>"
        title = {"model": WITH, "messages": turn(task), "stream": False, "max_completion_tokens": 4}
        assert webui.post("/chat/completions", json=title).json()["usage"]["completion_tokens"] == 4
        body["messages"] = [*history, *turn(FERRY_QUESTION)]
        second = events(webui.post("/chat/completions", json=body).text.splitlines())
        assert second[-2]["kv_memory"]["sources"][0]["document_id"] == "ferry"


class _Encoder:
    name = "tiny-encoder"

    def embed(self, texts: list[str]) -> Any:
        return np.array([[len(text), text.count("a"), 1.0] for text in texts], dtype=np.float32)


def test_embeddings(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setattr(type(server.memory), "encoder", _Encoder(), raising=False)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        # The client asks for base64 and decodes it.
        done = client.embeddings.create(model="tiny-encoder", input=["banana", "b"])
        assert [each.embedding for each in done.data] == [[6.0, 3.0, 1.0], [1.0, 0.0, 1.0]]
        assert client.embeddings.create(model="tiny-encoder", input="a", encoding_format="float").data[0].index == 0
        for wrong in ({"model": "other", "input": "a"}, {"model": "tiny-encoder", "input": "a", "dimensions": 5}):
            with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
                client.embeddings.create(**wrong)
    raw = server.post("/v1/embeddings", {"model": "tiny-encoder", "input": "a", "encoding_format": "base64"}).json()
    assert len(base64.b64decode(raw["data"][0]["embedding"])) == 12
    found = OpenAIEmbeddings(
        model="tiny-encoder", base_url=f"{server.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    assert found.embed_query("aa") == [2.0, 2.0, 1.0]
    assert server.post("/v1/embeddings", {"model": "tiny-encoder", "input": [1, 2]}).status_code == 400
