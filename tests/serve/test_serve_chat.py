"""Answers over HTTP: from documents chosen in several ways, whole and streamed, with usage and sources."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from kv_memory import DecodeSettings
from tests.memories import FERRY_QUESTION, LAMP_QUESTION
from tests.serve.running import MODEL, Running, events

ASK = {"messages": [{"role": "user", "content": FERRY_QUESTION}], "max_tokens": 6}


def ask(http: httpx.Client, **fields: Any) -> Any:
    done = http.post("/v1/chat/completions", json={"model": MODEL, **ASK, **fields})
    assert done.status_code == 200, done.text
    return done.json()


def sources(answer: Any) -> list[tuple[str, int]]:
    return [(each["document_id"], each["passage"]) for each in answer["kv_memory"]["sources"]]


def test_a_model_with_a_collection_answers_from_retrieved_caches(shared: Running, http: httpx.Client) -> None:
    answer = ask(http, model=f"{MODEL}/default", kv_memory={"top_k": 1})
    want = shared.memory.ask(FERRY_QUESTION, top_k=1, settings=DecodeSettings(max_new_tokens=6))
    assert answer["choices"][0]["message"]["content"].strip() == want.text
    assert answer["object"] == "chat.completion" and answer["model"] == f"{MODEL}/default"
    assert sources(answer) == [("ferry", 0)] and answer["kv_memory"]["sources"][0]["score"] == want.sources[0].score
    assert answer["usage"] == {
        "prompt_tokens": want.n_prompt_tokens + want.n_cached_tokens,
        "completion_tokens": 6,
        "total_tokens": want.n_prompt_tokens + want.n_cached_tokens + 6,
        "prompt_tokens_details": {"cached_tokens": want.n_cached_tokens},
    }
    assert answer["choices"][0]["finish_reason"] == "length" and answer["kv_memory"]["ttft_s"] > 0


def test_the_model_alone_uses_no_documents(http: httpx.Client) -> None:
    answer = ask(http)
    assert sources(answer) == [] and answer["usage"]["completion_tokens"] == 6


def test_documents_are_chosen_by_ids_collection_and_question(http: httpx.Client) -> None:
    assert sources(ask(http, kv_memory={"document_ids": ["lamp", "ferry"]})) == [("lamp", 0), ("ferry", 0)]
    assert sources(ask(http, kv_memory={}))[0] == ("ferry", 0)
    assert sources(ask(http, kv_memory={"top_k": 1})) == [("ferry", 0)]
    assert sources(ask(http, kv_memory={"collection": "team"}, messages=_user("Where does the walrus sleep?"))) == [
        ("walrus", 0)
    ]
    assert sources(ask(http, model=f"{MODEL}/team", messages=_user("Where does the walrus sleep?"))) == [("walrus", 0)]


def test_a_question_that_finds_nothing_is_asked_with_those_before_it(http: httpx.Client) -> None:
    turns = [*_user(LAMP_QUESTION), {"role": "assistant", "content": "Oil."}, *_user("And then?")]
    assert sources(ask(http, model=f"{MODEL}/default", messages=turns))[0] == ("lamp", 0)
    # With nothing at all, the model replies without documents.
    nothing = ask(http, model=f"{MODEL}/default", messages=_user("Xyzzy?"))
    assert sources(nothing) == [] and nothing["usage"]["completion_tokens"] == 6


def test_text_instead_of_caches_makes_a_longer_prompt(http: httpx.Client) -> None:
    text = ask(http, kv_memory={"read_from": "text", "top_k": 1})
    cached = ask(http, kv_memory={"read_from": "caches", "top_k": 1})
    assert text["kv_memory"]["read_from"] == "text" and sources(text) == sources(cached) == [("ferry", 0)]
    details = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (text, cached)]
    assert details[0] < details[1]


def test_a_stream_has_the_same_text_and_ends_with_sources_and_usage(http: httpx.Client) -> None:
    whole = ask(http, kv_memory={"top_k": 1})
    body = {"model": MODEL, **ASK, "kv_memory": {"top_k": 1}, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response.iter_lines())
    *pieces, last, usage = chunks
    assert {each["object"] for each in chunks} == {"chat.completion.chunk"} and len({e["id"] for e in chunks}) == 1
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(each["choices"][0]["delta"].get("content", "") for each in (*pieces, last))
    assert text == whole["choices"][0]["message"]["content"]
    assert last["choices"][0]["finish_reason"] == "length" and sources(last) == [("ferry", 0)]
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert all(each["usage"] is None for each in (*pieces, last))


def test_sampling_is_repeatable_and_stop_ends_the_answer(http: httpx.Client) -> None:
    def text(**fields: Any) -> str:
        return str(ask(http, max_tokens=24, **fields)["choices"][0]["message"]["content"])

    greedy = text()
    assert text(temperature=1.5, seed=7, top_p=0.9) == text(temperature=1.5, seed=7, top_p=0.9) != greedy
    stopped = ask(http, max_tokens=24, stop=greedy.strip()[3:5])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["choices"][0]["message"]["content"] == greedy[: greedy.index(greedy.strip()[3:5])]


def test_a_schema_makes_json(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema |= {"additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    answer = ask(http, response_format=form, max_completion_tokens=32, max_tokens=None)
    assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"ok"}
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_fields_that_change_nothing_are_accepted(http: httpx.Client) -> None:
    harmless = {"user": "u", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "n": 1, "tools": []}
    harmless |= {"tool_choice": "auto", "frequency_penalty": 0, "logprobs": False, "service_tier": "auto", "stop": None}
    assert ask(http, **harmless)["choices"] == ask(http)["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_is_continued(http: httpx.Client, shared: Running, stream: bool) -> None:
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 5, "stream": stream}
    done = http.post("/v1/completions", json=body)
    assert done.status_code == 200
    want = shared.memory.reader.complete("Once upon a time", settings=DecodeSettings(max_new_tokens=5)).answer.text
    found = events(done.text.splitlines()) if stream else [done.json()]
    assert "".join(each["choices"][0]["text"] for each in found) == want
    assert {each["object"] for each in found} == {"text_completion"}


def test_a_text_completion_with_documents_is_a_question(http: httpx.Client) -> None:
    body = {"model": f"{MODEL}/default", "prompt": [LAMP_QUESTION], "max_tokens": 5}
    assert sources(http.post("/v1/completions", json=body).json())[0] == ("lamp", 0)


def test_models_are_listed_alone_and_with_each_collection(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert [each["id"] for each in listed["data"]] == [MODEL, f"{MODEL}/default", f"{MODEL}/team"]
    assert http.get(f"/v1/models/{MODEL}/team").json()["id"] == f"{MODEL}/team"
    assert http.get("/v1/models/gpt-4").status_code == 404


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
