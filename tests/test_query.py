"""References, answers from caches and texts, and answers without documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_memory import DecodeSettings, KVMemory
from kv_memory.cache.distilled import DistilledCache
from kv_memory.errors import CacheNotFoundError, ConfigError, ContextWindowError, FingerprintMismatchError
from kv_memory.generate import Generator, Turn, compose, generator
from kv_memory.query import Reference, key_of
from tests.conftest import make_tokenizer
from tests.memories import FERRY, FERRY_QUESTION, LAMP, LAMP_QUESTION, SETTINGS, open_memory, wide_backbone
from tests.query_samples import ASKED, SAMPLED, WALRUS, of, reference
from tests.reference import blank_tokens, plain_model, recorded_inputs

# -- references --------------------------------------------------------------------------------------------------------


@given(
    ratio=st.none() | st.floats(min_value=0, max_value=1, exclude_min=True),
    collection=st.none() | st.text(min_size=1, max_size=255),
)
def test_a_reference_round_trips_through_its_string(ratio: float | None, collection: str | None) -> None:
    given_ = reference(FERRY, keep_ratio=ratio, collection=collection)
    assert Reference.parse(str(given_)) == given_
    assert Reference.parse(given_) is given_


@pytest.mark.parametrize("collection", ["a/b", "@0.5", "x@0.25/y", " ", "two\nlines", "ö", "../../elsewhere"])
@pytest.mark.parametrize("ratio", [None, 1, 1 / 3, 1e-7])
def test_a_reference_round_trips_any_collection_name(ratio: float | None, collection: str) -> None:
    given_ = reference(FERRY, keep_ratio=ratio, collection=collection)
    assert Reference.parse(str(given_)) == given_


def test_string_forms_of_references() -> None:
    assert str(reference(FERRY)) == key_of(FERRY)
    assert str(reference(FERRY, keep_ratio=0.25)) == f"{key_of(FERRY)}@0.25"
    assert str(reference(FERRY, keep_ratio=0.25, collection="a")) == f"{key_of(FERRY)}@0.25/a"
    assert str(reference(FERRY, text=FERRY)) == key_of(FERRY)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "ferry",
        "0" * 63,
        "0" * 65,
        "F" * 64,
        "0" * 64 + "@",
        "0" * 64 + "/",
        "0" * 64 + "@0",
        "0" * 64 + "@1.5",
        "0" * 64 + "@-0.5",
        "0" * 64 + "@1.2.3",
        "0" * 64 + "@nan",
        " " + "0" * 64,
        7,
        None,
    ],
)
def test_invalid_references_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="reference") as caught:
        Reference.parse(value)
    assert caught.value.where is not None and str(value)[:39] in caught.value.where


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["best_last", "best_first"])
def test_the_best_passage_is_next_to_the_question_unless_told_otherwise(
    tmp_path: Path, wide: Any, monkeypatch: pytest.MonkeyPatch, order: Any
) -> None:
    placed: list[list[str | None]] = []
    biased: set[str | None] = set()

    def noting(backbone: Any, caches: Sequence[DistilledCache], **options: Any) -> Any:
        placed.append([cache.text_sha256 for cache in caches])
        biased.update(cache.text_sha256 for cache in caches if cache.bias is not None)
        return compose(backbone, caches, **options)

    monkeypatch.setattr(generator, "compose", noting)
    options = {} if order == "best_last" else {"order": order}  # best_last is the default
    with open_memory(tmp_path / "store", wide, keep_text=True, **options) as memory:
        memory.add_passages("notes", [LAMP, FERRY, "The kettle sings, and nobody leaves."])
        question = "Where is the pier of the ferry to Skarholm, and what of the lamp?"
        found = [hit.text_sha256 for hit in memory.retrieve(question, top_k=2)]
        assert found[0] == key_of(FERRY) and len(found) == 2
        for read_from in ("caches", "text"):
            answer = memory.ask(question, top_k=2, settings=SETTINGS, read_from=read_from)  # type: ignore[arg-type]
            assert [hit.text_sha256 for hit in answer.sources] == found
    assert placed == [found[::-1] if order == "best_last" else found, []]
    assert biased == {found[1]}  # caches of this selector have none of their own


# -- replies -----------------------------------------------------------------------------------------------------------


def test_a_reply_equals_the_answer_of_the_memory(memory: KVMemory) -> None:
    answer = memory.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS)
    stream = memory.reader.reply(ASKED, [reference(FERRY)], settings=SETTINGS)
    reply = stream.answer
    assert reply.text.strip() == answer.text
    assert of(reply)[1:4] == (answer.finish_reason, answer.n_prompt_tokens, answer.n_cached_tokens)
    assert (reply.n_new_tokens, reply.damaged) == (4, ())
    assert 0 < reply.ttft_s < reply.total_s
    assert stream.answer == reply


def test_references_are_composed_in_their_order(memory: KVMemory, wide: Any) -> None:
    caches = {text: memory.store.get(key_of(text), memory.compressor.fingerprint(), 0.25) for text in (FERRY, LAMP)}
    for texts in ((FERRY, LAMP), (LAMP, FERRY)):
        expected = Generator(wide).generate(FERRY_QUESTION, [caches[text] for text in texts], settings=SAMPLED)
        reply = memory.reader.reply(ASKED, [reference(text) for text in texts], settings=SAMPLED).answer
        assert (reply.text, reply.n_cached_tokens) == (expected.text, expected.n_cached_tokens)


def test_texts_are_prefilled_after_the_caches(memory: KVMemory, wide: Any) -> None:
    cache = memory.store.get(key_of(FERRY), memory.compressor.fingerprint(), 0.25)
    expected = Generator(wide).stream(FERRY_QUESTION, [cache], texts=[LAMP, WALRUS], settings=SAMPLED).answer
    with recorded_inputs(wide) as inputs:
        reply = memory.reader.reply(ASKED, [reference(FERRY)], texts=[LAMP, WALRUS], settings=SAMPLED).answer
    read = "".join(wide.prompt.document(text) for text in (LAMP, WALRUS)) + wide.prompt.question(FERRY_QUESTION)
    assert wide.tokenizer.decode(inputs[0][0]) == read
    assert (reply.text, reply.n_prompt_tokens, reply.n_cached_tokens) == (expected.text, len(read), 11 + cache.n_kept)


def test_earlier_turns_are_prefilled(memory: KVMemory, wide: Any) -> None:
    turns = [Turn("user", "Hello."), Turn("assistant", "Hello!"), *ASKED]
    with recorded_inputs(wide) as inputs:
        reply = memory.reader.reply(turns, [reference(FERRY)], settings=SETTINGS).answer
    assert wide.tokenizer.decode(inputs[0][0]) == f"Q: Hello.\nA:Hello!\nQ: {FERRY_QUESTION}\nA:"
    assert reply.n_prompt_tokens == inputs[0].shape[1]


def test_joined_pieces_equal_the_reply(memory: KVMemory) -> None:
    stream = memory.reader.reply(ASKED, [reference(FERRY)], settings=SAMPLED)
    pieces = list(stream)
    assert all(pieces) and "".join(pieces) == stream.answer.text
    assert list(stream) == []


def test_the_reply_of_an_unfinished_stream_is_complete(memory: KVMemory) -> None:
    stream = memory.reader.reply(ASKED, [reference(FERRY)], settings=SAMPLED)
    first = next(stream)
    assert stream.answer.n_new_tokens == 40 and stream.answer.text.startswith(first)


def test_a_batch_equals_each_question_alone(memory: KVMemory) -> None:
    memory.add_passages("both", [FERRY, LAMP])
    references, questions = [reference(FERRY), reference(LAMP)], [FERRY_QUESTION, LAMP_QUESTION, "Why?"]
    together = memory.ask_many(questions, document_id="both", settings=SAMPLED)
    alone = [memory.reader.reply([Turn("user", q)], references, settings=SAMPLED).answer for q in questions]
    assert [(answer.token_ids, answer.n_cached_tokens) for answer in together] == [
        (answer.token_ids, answer.n_cached_tokens) for answer in alone
    ]
    assert memory.ask_many([], document_id="both") == []


# -- which cache -------------------------------------------------------------------------------------------------------


def test_references_resolve_other_keep_ratios_and_collections(memory: KVMemory) -> None:
    half = memory.in_collection(memory.collection, keep_ratio=0.5)
    half.refresh()
    other = memory.in_collection("odd/name@0.5")
    other.add(("walrus", WALRUS))
    n_kept = {(info.text_sha256, info.keep_ratio): info.n_kept for m in (memory, other) for info in m.store.caches()}
    assert len(n_kept) == 5
    for given_ in (
        reference(FERRY),
        reference(FERRY, keep_ratio=0.5),
        reference(FERRY, collection=memory.collection),
        reference(WALRUS, keep_ratio=0.25, collection=other.collection),
    ):
        again = Reference.parse(str(given_))
        reply = memory.reader.reply(ASKED, [again], settings=SETTINGS).answer
        assert reply.n_cached_tokens == 11 + n_kept[given_.key, given_.keep_ratio or 0.25]
    expected = half.ask(FERRY_QUESTION, top_k=1, settings=SETTINGS)
    reply = memory.reader.reply(ASKED, [reference(FERRY, keep_ratio=0.5)], settings=SETTINGS).answer
    assert (reply.text.strip(), reply.n_cached_tokens) == (expected.text, expected.n_cached_tokens)
    mixed = memory.reader.reply(ASKED, [reference(FERRY), reference(WALRUS, collection=other.collection)]).answer
    assert mixed.n_cached_tokens == 11 + n_kept[key_of(FERRY), 0.25] + n_kept[key_of(WALRUS), 0.25]


def test_a_keep_ratio_of_many_digits_is_found(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, keep_ratio=1 / 3) as memory:
        memory.add(("ferry", FERRY))
        given_ = Reference.parse(str(reference(FERRY, keep_ratio=1 / 3)))
        assert memory.reader.reply(ASKED, [given_], settings=SETTINGS).answer.n_cached_tokens > 11


def test_has_and_check_report_missing_caches(memory: KVMemory, wide: Any) -> None:
    assert memory.reader.has(FERRY) and not memory.reader.has(WALRUS)
    memory.reader.check(FERRY)
    with pytest.raises(CacheNotFoundError):
        memory.reader.check(WALRUS)
    assert memory.in_collection(memory.collection, keep_ratio=0.5).reader.has(FERRY)  # a cache of another amount
    with open_memory(memory.path, wide, selector="sink_recent") as other:
        assert not other.reader.has(FERRY)
        for call in (lambda: other.reader.check(FERRY), lambda: other.reader.reply(ASKED, [reference(FERRY, text="")])):
            with pytest.raises(FingerprintMismatchError, match="method"):
                call()


# -- without documents -------------------------------------------------------------------------------------------------


def greedy(ids: list[int], n: int) -> list[int]:
    """What Transformers' own `generate` makes of the unmodified model, beginning with something visible."""
    model = plain_model("llama", max_position_embeddings=4096)
    tokens, blank = torch.tensor([ids]), blank_tokens(make_tokenizer(), model.config.vocab_size)
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
            begin_suppress_tokens=blank,
        )
    return [int(token) for token in out[0, len(ids) :]]


def test_reply_alone_uses_only_the_chat_template(memory: KVMemory, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    backbone = type(memory.backbone)(
        wide_backbone().model, tokenizer, prompt=memory.backbone.prompt, weights_sha256=memory.backbone.weights_sha256
    )
    text = "<system>Be brief.\n<user>Hello.\n<assistant>Hello!\n<user>Why?\n<assistant>"
    ids = backbone.encode(text)
    turns = [Turn("system", "Be brief."), Turn("user", "Hello."), Turn("assistant", "Hello!"), Turn("user", "Why?")]
    with open_memory(memory.path, backbone) as other, recorded_inputs(backbone) as inputs:
        reply = other.reader.reply_alone(turns, settings=DecodeSettings(max_new_tokens=20)).answer
        assert inputs[0].tolist() == [ids] and all(step.shape == (1, 1) for step in inputs[1:])
        expected = greedy(ids, 20)
        assert [int(step) for step in inputs[1:]] == expected[: len(inputs) - 1]
        assert reply.text == backbone.tokenizer.decode(expected, skip_special_tokens=True)
        assert (reply.n_prompt_tokens, reply.n_cached_tokens) == (len(ids), 0)
        inputs.clear()
        with pytest.raises(ContextWindowError):
            other.reader.reply_alone(turns, settings=DecodeSettings(max_new_tokens=4096))
        assert inputs == []


def test_reply_alone_uses_the_prefix_without_a_template(memory: KVMemory) -> None:
    reply = memory.reader.reply_alone(ASKED, settings=SAMPLED).answer
    assert of(reply) == of(memory.reader.reply(ASKED, settings=SAMPLED).answer)
    assert reply.n_cached_tokens == 11


def test_complete_continues_a_text(memory: KVMemory, wide: Any) -> None:
    text = "Once upon a time"
    reply = memory.reader.complete(text, settings=DecodeSettings(max_new_tokens=20)).answer
    expected = greedy(wide.encode(text), 20)
    assert reply.text == wide.tokenizer.decode(expected, skip_special_tokens=True)
    assert (reply.n_prompt_tokens, reply.n_cached_tokens) == (len(text), 0)
    form = wide.prompt
    whole = form.prefix + form.document(FERRY) + form.question(FERRY_QUESTION)
    reply = memory.reader.complete(whole, settings=SAMPLED).answer
    assert of(reply) == of(memory.reader.reply(ASKED, texts=[FERRY], settings=SAMPLED).answer)
    with pytest.raises(ConfigError, match="empty prompt"):
        memory.reader.complete("")
