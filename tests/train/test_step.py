"""Batches, the step of distillation, and the scorer's warm-up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kv_memory.compress import Adapter, Reconstruction
from kv_memory.compress.kept import pad
from kv_memory.compress.refine.batching import gather_entries
from kv_memory.compress.refine.loss import distillation_loss, kl_divergence
from kv_memory.datasets import Example, Question
from kv_memory.errors import ConfigError, DatasetError
from kv_memory.train.batches import Batch, Batches
from kv_memory.train.settings import TrainSettings, preset
from kv_memory.train.step import distillation_step, label_rows, received_attention, scorer_loss, warmup_step
from tests.conftest import make_backbone
from tests.reference import letters, shared_backbone

SETTINGS = TrainSettings(rank=4, scorer_size=8, max_tokens=60, answer_tokens=8, span_tokens=12, composition_share=0.0)
EXAMPLES = [
    Example(
        id=str(index),
        context=letters(40 + index, seed=index),
        questions=(Question(text="who?", answers=(letters(40 + index, seed=index)[3:9],)),),
        source="test",
    )
    for index in range(7)
]


def adapter_for(name: str, settings: TrainSettings = SETTINGS, **options: Any) -> Adapter:
    return Adapter.create(
        make_backbone(name),
        rank=settings.rank,
        targets=settings.targets,
        scorer=settings.scorer,
        budget=settings.budget,
        scorer_size=settings.scorer_size,
        routed=settings.routed,
        **options,
    )


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_depends_only_on_seed_and_step(backbone: Any) -> None:
    settings = replace(SETTINGS, composition_share=0.5, batch_documents=2)
    one, other = Batches(EXAMPLES, backbone, settings), Batches(EXAMPLES, backbone, settings)
    forwards = [one.batch(step) for step in range(9)]
    assert [other.batch(step) for step in reversed(range(9))] == forwards[::-1]
    assert len({batch.documents for batch in forwards}) == 9
    assert Batches(EXAMPLES, backbone, replace(settings, seed=1)).batch(0) != forwards[0]


def test_every_example_occurs_once_per_epoch(backbone: Any) -> None:
    batches = Batches(EXAMPLES, backbone, SETTINGS)
    for epoch in range(3):
        seen = [batches.batch(epoch * 7 + step).documents[0] for step in range(7)]
        assert sorted(seen) == sorted(tuple(backbone.encode_document(e.context)) for e in EXAMPLES)


def test_rows_contain_questions_and_spans(backbone: Any) -> None:
    batch = Batches(EXAMPLES, backbone, replace(SETTINGS, spans_per_document=2)).batch(0)
    (document,) = batch.documents
    question, *spans = batch.rows
    text = backbone.tokenizer.decode(question.ids)
    assert text.startswith("Q: who?\nA: ") and question.n_given == len(backbone.encode("Q: who?\nA:"))
    assert text[len("Q: who?\nA: ") :].removesuffix("</s>") in backbone.tokenizer.decode(document)
    assert len(spans) == 2
    joined = ",".join(map(str, document))
    for span in spans:
        assert ",".join(map(str, span.ids[span.n_given - 6 :])) in joined
    assert SETTINGS.min_ratio <= batch.keep_ratio <= SETTINGS.max_ratio


def test_several_documents_are_joined(backbone: Any) -> None:
    batch = Batches(EXAMPLES, backbone, replace(SETTINGS, composition_share=1.0)).batch(3)
    (group,) = batch.groups
    assert len(group) == len(batch.documents) in {2, 3}
    assert sum(map(len, batch.documents)) <= 60


def test_long_documents_are_cut_and_keep_answerable_questions(backbone: Any) -> None:
    text = letters(300, seed=5)
    asked = tuple(Question(text=f"{at}?", answers=(text[at : at + 5],)) for at in range(0, 290, 10))
    batches = Batches([Example(id="long", context=text, questions=asked, source="test")], backbone, SETTINGS)
    starts = set()
    for step in range(6):
        batch = batches.batch(step)
        window = backbone.tokenizer.decode(batch.documents[0]).removeprefix("Doc: ").removesuffix("\n")
        assert len(batch.documents[0]) == 60 and window in text
        starts.add(text.index(window))
        for row in batch.rows:
            answer = backbone.tokenizer.decode(row.ids[row.n_given :]).removesuffix("</s>").strip()
            assert answer in window
    assert len(starts) > 2


def test_no_examples_is_an_error(backbone: Any) -> None:
    with pytest.raises(DatasetError, match="no examples to train on"):
        Batches([], backbone, SETTINGS)


@pytest.mark.parametrize(
    "change", [{"min_ratio": 0.7}, {"max_ratio": 1.5}, {"rank": 0}, {"scorer": "all"}, {"forward_weight": 2.0}]
)
def test_settings_out_of_range_are_rejected(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TrainSettings(**change)


def test_presets() -> None:
    paper = preset("paper", steps=5)
    assert (paper.scorer, paper.routed, paper.targets, paper.steps) == ("token", "kept", ("q", "o"), 5)
    with pytest.raises(ConfigError, match="unknown preset"):
        preset("papre")


# -- the objective -----------------------------------------------------------------------------------------------------


def test_divergences_equal_their_definitions() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(5, 11), torch.randn(5, 11)
    forward = torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1)
    backward = torch.nn.functional.kl_div(p.log_softmax(-1), q.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), forward)
    torch.testing.assert_close(distillation_loss(p, q, forward_weight=0.6), 0.6 * forward + 0.4 * backward)
    assert kl_divergence(p, p).abs().max() < 1e-6


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "answers"), [("llama", "teacher"), ("mistral", "people"), ("gemma2", "people")])
def test_a_student_that_keeps_everything_has_zero_loss(name: str, answers: Any) -> None:
    settings = replace(SETTINGS, answers=answers, batch_documents=2, composition_share=0.5)
    adapter = adapter_for(name)
    batches = Batches(EXAMPLES, adapter.backbone, settings)
    for step in range(2):
        whole = distillation_step(adapter, replace(batches.batch(step), keep_ratio=1.0), settings=settings)
        assert abs(float(whole.loss.detach())) < 1e-4
        some = distillation_step(adapter, replace(batches.batch(step), keep_ratio=0.1), settings=settings)
        assert float(some.loss.detach()) > 5 * abs(float(whole.loss.detach())) + 2e-4 and some.n_tokens > 60


@pytest.mark.parametrize(("name", "form"), [("llama", "paper"), ("mistral", "default"), ("qwen3", "default")])
def test_training_the_lora_lowers_the_loss(name: str, form: str) -> None:
    """On the same two documents again and again, what is kept staying as it is."""
    chosen = replace(preset(form), rank=8, max_tokens=60, answer_tokens=8, span_tokens=12, batch_documents=2)
    adapter = adapter_for(name, chosen)
    lora = [p for n, p in adapter.peft_model.named_parameters() if "lora_" in n]
    for parameter in lora:
        parameter.requires_grad_(True)
    batch = replace(Batches(EXAMPLES, adapter.backbone, chosen).batch(0), keep_ratio=0.3)
    optimizer = torch.optim.Adam(lora, lr=1e-2)
    losses = []
    for _ in range(10):
        result = distillation_step(adapter, batch, settings=chosen)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(float(result.loss.detach()))
    assert min(losses[-3:]) < 0.9 * losses[0]


def test_ratio_power_weighs_the_loss_by_keep_ratio() -> None:
    """The loss weighs by keep ratio; in the middle of the range it weighs what it did."""
    adapter = adapter_for("llama")
    for ratio, weight in ((0.5, 4.0), (0.125, 1.0), (0.03125, 0.25)):
        losses = []
        for power in (0.0, 1.0):
            settings = replace(SETTINGS, ratio_power=power, min_ratio=0.03125, max_ratio=0.5)
            batch = replace(Batches(EXAMPLES, adapter.backbone, settings).batch(0), keep_ratio=ratio)
            losses.append(float(distillation_step(adapter, batch, settings=settings).loss.detach()))
        assert losses[1] == pytest.approx(weight * losses[0], rel=1e-4)


@pytest.mark.parametrize("form", ["default", "paper"])
def test_distillation_reaches_the_scorer(form: str) -> None:
    chosen = replace(preset(form), rank=4, max_tokens=60, answer_tokens=8, span_tokens=12, batch_documents=2)
    adapter = adapter_for("llama", chosen)
    adapter.scorer.requires_grad_(True)
    batch = replace(Batches(EXAMPLES, adapter.backbone, chosen).batch(0), keep_ratio=0.2)
    distillation_step(adapter, batch, settings=chosen).loss.backward()
    for parameter in adapter.scorer.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    adapter.scorer.zero_grad(set_to_none=True)
    adapter.scorer.requires_grad_(False)
    frozen = distillation_step(adapter, batch, settings=replace(chosen, lr_scorer_distil=0.0)).loss
    assert not frozen.requires_grad


# -- warm-up -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_labels_are_the_scores_of_the_reconstruction_selector(name: str) -> None:
    if name == "gemma2":  # its windows: the labels see through them, by design
        backbone: Any = make_backbone(name, sliding_window=400)
    else:
        backbone = shared_backbone(name)
    documents = [backbone.encode(letters(n, seed=n)) for n in (30, 50)]
    batch = Batch(documents=tuple(map(tuple, documents)), groups=((0,), (1,)), rows=(), keep_ratio=0.5)
    ids, lengths = pad(documents, device="cpu")
    selector = Reconstruction()
    with torch.no_grad():
        cache = backbone.prefixed_cache(ids.shape[1], batch_size=2)
        backbone.prefill(ids, cache, lengths=lengths)
        entries = gather_entries(backbone, cache)
        labels = received_attention(backbone, entries, label_rows(batch, (), backbone))
        for index, document in enumerate(documents):
            one = torch.tensor([document])
            alone = backbone.prefixed_cache(len(document), room=150)
            expected = selector.score(backbone, one, alone)
            torch.testing.assert_close(labels[:, index, :, : len(document)], expected, rtol=1e-3, atol=1e-5)
    assert labels[:, 0, :, 30:].abs().max() == 0  # padding receives nothing


@pytest.mark.parametrize("scorer", ["token", "head", "layer"])
def test_warm_up_lowers_the_scorer_loss(scorer: Any) -> None:
    settings = replace(SETTINGS, scorer=scorer, routed="kept", budget="head", scorer_size=32)
    adapter = adapter_for("llama", settings)
    adapter.scorer.requires_grad_(True)
    batch = Batches(EXAMPLES, adapter.backbone, settings).batch(1)
    optimizer = torch.optim.Adam(adapter.scorer.parameters(), lr=2e-2)
    losses = []
    for _ in range(15):
        result = warmup_step(adapter, batch, settings=settings)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(float(result.loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_scorer_loss_depends_on_the_order_within_a_head() -> None:
    labels = torch.rand(2, 1, 3, 20).clamp(min=0.01)
    lengths = torch.tensor([20])
    logs = (labels + 1e-3).log()
    right = (logs - logs.mean(-1, keepdim=True)) / logs.std(-1, keepdim=True, correction=0)
    assert scorer_loss(right, labels, lengths, budget="head") < 1e-3
    assert scorer_loss(-right, labels, lengths, budget="head") > 3
    padded = torch.nn.functional.pad(labels, (0, 7), value=0.5)
    assert scorer_loss(torch.nn.functional.pad(right, (0, 7), value=9.0), padded, lengths, budget="head") < 1e-3


def test_with_one_budget_scores_are_compared_across_heads() -> None:
    labels = torch.rand(2, 1, 3, 20).clamp(min=0.01)
    same = labels.log() / 2 + 2
    assert scorer_loss(same, labels, torch.tensor([20]), budget="model") < 1e-2
    shifted = same + torch.arange(3)[:, None]  # the right order within each head is not enough
    assert scorer_loss(shifted, labels, torch.tensor([20]), budget="model") > 1


def test_documents_too_short_for_rows_are_skipped(backbone: Any) -> None:
    short = [Example(id=str(i), context="ab", questions=(), source="test") for i in range(3)]
    with pytest.raises(DatasetError, match="too short"):
        Batches(short, backbone, SETTINGS).batch(0)
    batches = Batches([*short, EXAMPLES[0]], backbone, SETTINGS)
    for step in range(4):
        assert len(batches.batch(step).documents[0]) > 20
