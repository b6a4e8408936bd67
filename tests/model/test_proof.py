"""The claim everything stands on: decoding from caches is what the untouched model computes from the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kv_memory import DecodeSettings, KVMemory
from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Adapter, Compressor
from kv_memory.generate import Generator, compose
from kv_memory.model.attention import ForwardContext
from tests.conftest import ARCHITECTURES, make_backbone
from tests.reference import (
    FixedRouting,
    assert_close,
    blank_tokens,
    full_logits,
    letters,
    plain_model,
    recorded_inputs,
    separate_logits,
    shared_backbone,
)

EVERY = pytest.mark.parametrize("name", list(ARCHITECTURES))
QUESTION = "where is it?"
# Both longer than the sliding windows of 24. Two documents of 28 stay within the 96 positions at which the longrope
# model changes its frequencies, and one of 84 goes beyond them.
LENGTHS = pytest.mark.parametrize("length", [28, 84])


def plain_caches(backbone: Any, texts: Sequence[str]) -> list[DistilledCache]:
    compressor = Compressor(backbone, selector="sink_recent")
    return [compressor.compress(text, keep_ratio=1.0) for text in texts]


def question_logits(backbone: Any, caches: Sequence[DistilledCache]) -> torch.Tensor:
    """The logits after every token of the question, `(n, vocab_size)`."""
    ids = torch.tensor([backbone.encode_question(QUESTION)])
    cache = compose(backbone, caches, n_question=ids.shape[1])
    with torch.no_grad():
        return backbone.logits(ids, cache, every=True)[0]


@LENGTHS
@EVERY
def test_one_document_equals_a_full_prefill(name: str, length: int) -> None:
    backbone, text = shared_backbone(name), letters(length)
    question = backbone.encode_question(QUESTION)
    ids = [*backbone.prefix_ids, *backbone.encode_document(text), *question]
    assert_close(question_logits(backbone, plain_caches(backbone, [text])), full_logits(name, ids)[-len(question) :])


@LENGTHS
@EVERY
def test_two_documents_equal_a_prefill_with_mutual_masking(name: str, length: int) -> None:
    backbone = shared_backbone(name)
    texts = [letters(length, seed=1), letters(length - 4, seed=2)]
    prefix, question = list(backbone.prefix_ids), backbone.encode_question(QUESTION)
    documents = [backbone.encode_document(text) for text in texts]
    ours = question_logits(backbone, plain_caches(backbone, texts))
    assert_close(ours, separate_logits(name, prefix, documents, question))
    # The masks matter: where documents see each other the logits are others.
    together = full_logits(name, [*prefix, *documents[0], *documents[1], *question])[-len(question) :]
    assert (ours - together).abs().max() > 0.01


@EVERY
def test_without_a_prefix_two_documents_equal_plain_block_diagonal_attention(name: str) -> None:
    # Nothing stands before the documents here, so the reference is one ordinary sequence under a block-diagonal mask.
    backbone = make_backbone(name)
    backbone = type(backbone)(backbone.model, backbone.tokenizer, prompt=replace(backbone.prompt, prefix=""))
    assert backbone.prefix_ids == ()
    texts = [letters(28, seed=1), letters(24, seed=2)]
    documents, question = [backbone.encode_document(text) for text in texts], backbone.encode_question(QUESTION)
    assert_close(
        question_logits(backbone, plain_caches(backbone, texts)), separate_logits(name, [], documents, question)
    )


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2_yarn", "gemma2", "gemma3", "phi3"])
def test_greedy_decoding_equals_generate(name: str) -> None:
    # Untied, because a random Gemma with tied embeddings repeats the last token for ever.
    changes = {"tie_word_embeddings": False}
    backbone, text = shared_backbone(name, **changes), letters(40, seed=3)
    question = backbone.encode_question(QUESTION)
    ids = torch.tensor([[*backbone.prefix_ids, *backbone.encode_document(text), *question]])
    # An answer begins with something that can be seen.
    blank = blank_tokens(backbone.tokenizer, backbone.config.vocab_size)
    out = plain_model(name, **changes).generate(ids, max_new_tokens=12, do_sample=False, begin_suppress_tokens=blank)
    expected = out[0, ids.shape[1] :].tolist()
    answer = Generator(backbone).generate(
        QUESTION, plain_caches(backbone, [text]), settings=DecodeSettings(max_new_tokens=12)
    )
    assert list(answer.token_ids) == expected
    assert len(set(expected)) > 3, "a model that repeats itself proves nothing"


SETTINGS = DecodeSettings(max_new_tokens=6)


def assert_only_the_question_is_read(backbone: Any, inputs: Sequence[torch.Tensor]) -> None:
    """First the question, then one token at a time; nothing else ever enters the model."""
    assert inputs[0].tolist() == [backbone.encode_question(QUESTION)]
    assert all(ids.shape == (1, 1) for ids in inputs[1:])
    assert len(inputs) <= SETTINGS.max_new_tokens


def test_no_document_tokens_are_prefilled_at_question_time(backbone: Any) -> None:
    caches = [replace(cache) for cache in plain_caches(backbone, [letters(40, seed=s) for s in (1, 2)])]
    generator = Generator(backbone)
    with recorded_inputs(backbone) as inputs:
        answer = generator.generate(QUESTION, caches, settings=SETTINGS)
    assert_only_the_question_is_read(backbone, inputs)
    assert [ids.item() for ids in inputs[1:]] == list(answer.token_ids[:-1])
    with recorded_inputs(backbone) as inputs:
        assert "".join(generator.stream(QUESTION, caches, settings=SETTINGS)) == answer.text
    assert_only_the_question_is_read(backbone, inputs)


def test_no_document_tokens_are_prefilled_through_the_facade(tmp_path: Path) -> None:
    text = f"where is it? {letters(300, seed=5)}"
    backbone = make_backbone(max_position_embeddings=4096)
    options: dict[str, Any] = {"selector": "attention", "keep_ratio": 0.25, "passage_tokens": 64}
    with KVMemory.open(tmp_path / "store", model=backbone, **options) as memory:
        memory.add(text)
    # A process that has never seen the document.
    backbone = make_backbone(max_position_embeddings=4096)
    with KVMemory.open(tmp_path / "store", model=backbone, **options) as memory:
        with recorded_inputs(backbone) as inputs:
            answer = memory.ask(QUESTION, settings=SETTINGS)
        assert answer.sources
        assert_only_the_question_is_read(backbone, inputs)
        with recorded_inputs(backbone) as inputs:
            stream = memory.stream(QUESTION, settings=SETTINGS)
            assert "".join(stream).strip() == answer.text
        assert_only_the_question_is_read(backbone, inputs)
    # The same question over the text does read it, so that the recording is known to work.
    with KVMemory.open(tmp_path / "store", model=backbone, keep_text=True) as memory:
        memory.add(text)  # the text is kept from now on, nothing is compressed
        with recorded_inputs(backbone) as inputs:
            memory.ask(QUESTION, settings=SETTINGS, read_from="text")
        assert inputs[0].shape[1] > len(backbone.encode_question(QUESTION)) + 30


@pytest.mark.parametrize("part", ["keys", "values"])
@EVERY
def test_the_answer_depends_on_cached_keys_and_values(name: str, part: str) -> None:
    backbone = shared_backbone(name)
    (cache,) = plain_caches(backbone, [letters(40)])
    before = question_logits(backbone, [cache])
    changed = replace(cache, **{part: getattr(cache, part).flip(2)})
    assert (question_logits(backbone, [changed]) - before).abs().max() > 0.1


@EVERY
def test_an_adapter_changes_only_routed_tokens(name: str) -> None:
    backbone = make_backbone(name)
    (cache,) = plain_caches(backbone, [letters(40)])
    ids = torch.tensor([backbone.encode(letters(20, seed=7))])

    def from_cache(routing: torch.Tensor | None = None) -> torch.Tensor:
        context = ForwardContext(routing=None if routing is None else FixedRouting(routing))
        return backbone.logits(ids, compose(backbone, [cache], n_question=20), every=True, context=context)[0]

    with torch.no_grad():
        before, alone = from_cache(), backbone.model(ids).logits
        adapter = Adapter.create(backbone, rank=4, zero_init=False)
        assert torch.equal(from_cache(), before)
        assert torch.equal(backbone.model(ids).logits, alone)

        mask = torch.zeros(1, 20, dtype=torch.bool)
        mask[0, 9] = True
        routed = from_cache(mask)
        assert torch.equal(routed[:9], before[:9])
        assert (routed[9] - before[9]).abs().max() > 0.01
        assert torch.equal(from_cache(torch.zeros_like(mask)), before)

        assert torch.equal(from_cache(), before)  # the mask is gone with its forward pass
        adapter.detach()
        assert torch.equal(from_cache(), before)
        assert torch.equal(backbone.model(ids).logits, alone)
