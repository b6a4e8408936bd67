"""What the integration stands on: no text of documents is read at question time, caches decide, nothing is left."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage

from kv_memory import KVMemory
from kv_memory.integrations.llama_index import (
    KVMemoryChatEngine,
    KVMemoryCondensePlusContextChatEngine,
    KVMemoryLLM,
    KVMemoryQueryEngine,
    KVMemorySynthesizer,
)
from kv_memory.model.kv_cache import PositionedCache
from kv_memory.query import key_of
from tests.integrations.llama_index.li_samples import WordRetriever, index_over, keys_of, two_nodes
from tests.memories import FERRY, FERRY_QUESTION, LAMP, open_memory, wide_backbone
from tests.reference import recorded_inputs

# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("chat_memories")
async def test_no_document_text_is_prefilled_at_question_time(memory: KVMemory) -> None:
    index_over(memory, [])  # the caches are there already
    backbone = wide_backbone()  # a process that has never seen the documents
    question = "ferry lamp?"
    with open_memory(memory.path, backbone) as other:
        llm = KVMemoryLLM(other, max_tokens=6)
        retriever = WordRetriever(two_nodes(), top_k=2)
        engine = KVMemoryQueryEngine.from_defaults(retriever, llm=llm, on_missing="raise")
        streaming: Any = KVMemoryQueryEngine.from_defaults(retriever, llm=llm, on_missing="raise", streaming=True)
        index = VectorStoreIndex(two_nodes(), embed_model=MockEmbedding(embed_dim=4))
        stock = index.as_query_engine(llm=llm, response_synthesizer=KVMemorySynthesizer(llm), similarity_top_k=2)
        backbone.prefix  # noqa: B018 (of the model, not of a question)
        with recorded_inputs(backbone) as inputs:
            answers = [str(engine.query(question)), str(await engine.aquery(question))]
            answers.append("".join(streaming.query(question).response_gen))
            stream: Any = await streaming.aquery(question)
            answers.append("".join([piece async for piece in stream.async_response_gen()]))
            answers.append(str(stock.query(question)))
            for kind in (KVMemoryChatEngine, KVMemoryCondensePlusContextChatEngine):
                chat = kind.from_defaults(retriever=retriever, llm=llm)
                answers.append(str(chat.chat(question)))
        assert len(answers) == 7 and len(set(answers)) == 1
        # The question, seven times; everything else that entered the model it had decoded itself.
        prefills = [ids.tolist() for ids in inputs if ids.shape[1] > 1]
        assert prefills == [[backbone.encode_question(question)]] * 7
        decoded = [int(ids) for ids in inputs if ids.shape[1] == 1]
        assert decoded == decoded[: len(decoded) // 7] * 7
        # The same engine without caches does read the text, so that the recording is known to work.
        for id_ in ("ferry", "lamp"):
            other.remove(id_)
        with recorded_inputs(backbone) as inputs:
            KVMemoryQueryEngine.from_defaults(retriever, llm=llm, on_missing="text").query(question)
        read = [backbone.tokenizer.decode(ids[0]) for ids in inputs if ids.shape[1] > 1]
        assert any(FERRY in text for text in read) and any(LAMP in text for text in read)


@contextmanager
def first_logits(backbone: Any) -> Iterator[list[torch.Tensor]]:
    """The logits behind each question that is asked while the block runs."""
    seen: list[torch.Tensor] = []
    real = backbone.logits

    def noted(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = real(ids, *args, **kwargs)
        if ids.shape[1] > 1:
            seen.append(logits.clone())
        return logits

    backbone.logits = noted
    try:
        yield seen
    finally:
        del backbone.logits


@pytest.mark.parametrize("part", ["keys", "values"])
def test_the_answer_depends_on_the_contents_of_the_cache(memory: KVMemory, part: str) -> None:
    backbone, fingerprint = wide_backbone(), memory.compressor.fingerprint()
    with open_memory(memory.path, backbone) as other:
        retriever = WordRetriever(two_nodes())
        engine = KVMemoryQueryEngine.from_defaults(retriever, llm=KVMemoryLLM(other, max_tokens=2), on_missing="raise")
        with first_logits(backbone) as seen:
            engine.query(FERRY_QUESTION)
            engine.query(FERRY_QUESTION)
            cache = other.store.get(key_of(FERRY), fingerprint, 0.25)
            changed = replace(cache, **{part: getattr(cache, part).flip(2)})
            other.store.delete(key_of(FERRY))
            other.store.put(key_of(FERRY), changed)
            engine.query(FERRY_QUESTION)
    before, again, after = seen
    assert torch.equal(before, again)
    assert (after - before).abs().max() > 0.1


# -- breaking off ------------------------------------------------------------------------------------------------------

LONG_ANSWER = {"max_tokens": 200, "temperature": 1.0, "seed": 7}
ASKED = [ChatMessage(role="user", content=FERRY_QUESTION)]


@pytest.fixture
def spelling(wide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model answers in letters only, and for ever: what it says of other characters is held back till they end."""
    real, letters = wide.logits, torch.zeros(300, dtype=torch.bool)
    letters[wide.tokenizer.convert_tokens_to_ids(list(ascii_lowercase))] = True

    def logits(*args: Any, **kwargs: Any) -> torch.Tensor:
        return real(*args, **kwargs).masked_fill(~letters, float("-inf"))

    monkeypatch.setattr(wide, "logits", logits)


@pytest.fixture(scope="module")
def frozen() -> Iterator[None]:
    """Objects that exist already are not searched for caches."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_caches() -> int:
    gc.collect()
    return sum(type(thing) is PositionedCache for thing in gc.get_objects())


@contextmanager
def nothing_left(llm: KVMemoryLLM) -> Iterator[None]:
    """No cache is left of what the block began, and another question is answered as before."""
    before, answer = live_caches(), llm.chat(ASKED, kv_ids=keys_of(FERRY)).message.content
    yield
    assert live_caches() == before
    assert llm.chat(ASKED, kv_ids=keys_of(FERRY)).message.content == answer


async def settled(inputs: list[torch.Tensor]) -> int:
    """How many forward passes there were; fails if there are still more."""
    await asyncio.sleep(0.05)
    n = len(inputs)
    await asyncio.sleep(0.1)
    assert len(inputs) == n
    return n


@pytest.mark.usefixtures("frozen", "spelling")
def test_a_closed_stream_stops_decoding(llm: KVMemoryLLM, wide: Any) -> None:
    with nothing_left(llm), recorded_inputs(wide) as inputs:
        stream = llm.stream_chat(ASKED, kv_ids=keys_of(FERRY), **LONG_ANSWER)
        for _ in range(3):
            next(stream)
        n = len(inputs)
        stream.close()
        assert len(inputs) == n < 20


@pytest.mark.usefixtures("frozen")
def test_a_dropped_response_leaves_nothing_behind(llm: KVMemoryLLM, wide: Any) -> None:
    long = KVMemoryLLM(llm.memory, **LONG_ANSWER)
    engine = KVMemoryQueryEngine.from_defaults(WordRetriever(two_nodes()), llm=long, streaming=True)
    with nothing_left(llm), recorded_inputs(wide) as inputs:
        response: Any = engine.query(FERRY_QUESTION)
        next(response.response_gen)
        n = len(inputs)
        del response
        assert len(inputs) == n < 20


@pytest.mark.usefixtures("frozen")
def test_an_unread_stream_leaves_nothing_behind(llm: KVMemoryLLM) -> None:
    with nothing_left(llm):
        llm.stream_chat(ASKED, kv_ids=keys_of(FERRY), **LONG_ANSWER)


@pytest.mark.usefixtures("frozen", "spelling")
async def test_a_closed_asynchronous_stream_stops_decoding(llm: KVMemoryLLM, wide: Any) -> None:
    with nothing_left(llm), recorded_inputs(wide) as inputs:
        stream: Any = await llm.astream_chat(ASKED, kv_ids=keys_of(FERRY), **LONG_ANSWER)
        for _ in range(3):
            await anext(stream)
        n = len(inputs)
        await stream.aclose()
        assert await settled(inputs) == n < 20
        del stream


@pytest.mark.usefixtures("frozen", "spelling")
@pytest.mark.parametrize("way", ["achat", "streaming engine"])
async def test_a_cancelled_task_decodes_at_most_one_more_token(llm: KVMemoryLLM, wide: Any, way: str) -> None:
    long = KVMemoryLLM(llm.memory, **LONG_ANSWER)
    retriever = WordRetriever(two_nodes())

    async def ask() -> None:
        if way == "achat":
            await long.achat(ASKED, kv_ids=keys_of(FERRY))
        else:
            engine = KVMemoryQueryEngine.from_defaults(retriever, llm=long, streaming=True)
            response: Any = await engine.aquery(FERRY_QUESTION)
            async for _ in response.async_response_gen():
                pass

    with nothing_left(llm), recorded_inputs(wide) as inputs:
        task = asyncio.create_task(ask())
        while len(inputs) < 4:
            await asyncio.sleep(0)
        task.cancel()
        n = len(inputs)
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        assert await settled(inputs) <= n + 1 < 100


async def test_parallel_answers_equal_sequential_ones(llm: KVMemoryLLM, tmp_path: Path) -> None:
    alone = [llm.chat(ASKED, kv_ids=keys_of(text)).message.content for text in (FERRY, LAMP)]
    together = await asyncio.gather(*(llm.achat(ASKED, kv_ids=keys_of(text)) for text in (FERRY, LAMP) * 3))
    assert [response.message.content for response in together] == alone * 3
