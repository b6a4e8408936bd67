"""Refinement brings a cache closer to the full one, never further away, and says truly how close."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Adapter, Compressor, Matched, MatchSettings, Reconstruction, RefineSettings, refine_batch
from kv_memory.compress.refine.loss import kl_divergence
from kv_memory.compress.refine.optimizer_state import Progress
from kv_memory.compress.refine.probes import Probe, make_probes
from kv_memory.compress.refine.teacher import Teacher
from kv_memory.errors import ConfigError, ContextWindowError
from kv_memory.generate import compose
from tests.conftest import make_backbone
from tests.reference import letters, shared_backbone

# The weights of the tiny Gemma 3 are untied: tied, every token predicts itself, whatever the document.
CHANGES: dict[str, dict[str, Any]] = {"gemma3": {"tie_word_embeddings": False}}
NAMES = ["llama", "gemma2", "gemma3", "phi3_window", "phi3_longrope"]
TEXT = letters(70)
LONG = letters(90)  # for longrope, whose frequencies change at position 96: document and probes stand behind that


def text_of(name: str) -> str:
    return LONG if name == "phi3_longrope" else TEXT


# The best of all states is kept, whatever a kind says.
SETTINGS = RefineSettings(
    steps=6, evaluate_every=3, n_probes=4, probe_tokens=24, lr=0.03, tolerance=100.0, patience=100
)


def shared(name: str) -> Any:
    return shared_backbone(name, **CHANGES.get(name, {}))


_MADE: dict[Any, list[list[Probe]]] = {}  # making probes takes half of a refinement, and they are always the same


def made_once(
    backbone: Any, teacher: Teacher, documents: Sequence[Sequence[int]], settings: Any, **options: Any
) -> list[list[Probe]]:
    key = backbone, tuple(map(tuple, documents)), settings, repr(options)
    if key not in _MADE:
        _MADE[key] = make_probes(backbone, teacher, documents, settings, **options)
    return _MADE[key]


@pytest.fixture(autouse=True)
def _practised_probes_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model has nothing in common with itself elsewhere: what it practises is all it can get better at."""

    def doubled(*args: Any, **options: Any) -> list[list[Probe]]:
        made = [[probe for probe in own if probe.held_out] for own in made_once(*args, **options)]
        return [[*own, *(replace(probe, held_out=False) for probe in own)] for own in made]

    monkeypatch.setattr("kv_memory.compress.refine.optimize.make_probes", doubled)


def start_of(
    name: str, selector: Any = "attention", text: str | None = None, keep_ratio: float = 0.25
) -> DistilledCache:
    backbone = shared(name)
    ids = backbone.encode(text or text_of(name))
    return Compressor(backbone, selector=selector).compress_ids(ids, keep_ratio=keep_ratio)


def refine(
    name: str, start: DistilledCache, text: str | None = None, settings: RefineSettings = SETTINGS
) -> DistilledCache:
    backbone = shared(name)
    return refine_batch(backbone, [backbone.encode(text or text_of(name))], [start], settings=settings)[0]


@cache
def refined(name: str, selector: str = "attention") -> tuple[DistilledCache, DistilledCache]:
    """Start and result."""
    chosen: Any = Reconstruction(part_tokens=32) if selector == "reconstruction" else selector
    settings = MatchSettings(part_tokens=32, key_steps=6, depth_weight=0.0)  # the layers of a random model are alike
    chosen = Matched(settings) if selector == "matched" else chosen
    start = start_of(name, chosen)
    return start, refine(name, start)


@cache
def held_out(name: str, settings: RefineSettings) -> tuple[Teacher, list[Probe]]:
    """Probes that decide, and a teacher that is asked one by one."""
    backbone = shared(name)
    ids = [backbone.encode(text_of(name))]
    together, alone = (
        Teacher(backbone, ids, room=settings.extra_tokens, max_entries=n) for n in (settings.max_entries, 1)
    )
    (probes,) = made_once(backbone, together, ids, settings.probes, unasked=[()])
    return alone, [probe for probe in probes if probe.held_out]


def held_out_kl(name: str, found: DistilledCache, settings: RefineSettings = SETTINGS) -> float:
    """Measured the way a cache is used: composed, and every probe alone behind it."""
    backbone = shared(name)
    teacher, probes = held_out(name, settings)
    by_kind: dict[str, list[float]] = {}
    for probe in probes:
        row = torch.tensor([probe.row.ids])
        with torch.no_grad():
            logits = backbone.logits(row, compose(backbone, [found], n_question=row.shape[1]), every=True)[0]
        ((_, taught),) = teacher.logits([probe.row])
        kl = kl_divergence(taught, logits[probe.row.n_given - 1 : -1]).mean()
        by_kind.setdefault(probe.kind, []).append(float(kl))
    return sum(sum(own) / len(own) for own in by_kind.values()) / len(by_kind)


@pytest.mark.parametrize("name", NAMES)
class TestEveryArchitecture:
    def test_refinement_lowers_the_kl_and_records_it(self, name: str) -> None:
        start, found = refined(name)
        assert found.fidelity is not None and 0 < found.refined_steps <= SETTINGS.steps
        assert found.fidelity == pytest.approx(held_out_kl(name, found), rel=1e-3)
        assert found.fidelity < 0.9 * held_out_kl(name, start)

    def test_refinement_keeps_the_same_entries(self, name: str) -> None:
        start, found = refined(name)
        assert torch.equal(found.positions, start.positions)
        assert found.keys.shape == start.keys.shape and found.keys.dtype == start.keys.dtype
        assert not torch.equal(found.keys, start.keys) and not torch.equal(found.values, start.values)
        assert found.fingerprint.method == f"{start.fingerprint.method}|{SETTINGS.name}"
        assert start.bias is None and found.bias is not None and found.bias.any()
        assert found.fingerprint.format_version == 2


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_refining_a_matched_cache_changes_its_biases(name: str) -> None:
    start, found = refined(name, "matched")
    assert start.bias is not None and found.bias is not None and found.bias.shape == start.bias.shape
    moved = (found.bias - start.bias).abs()
    assert 0 < float(moved.max()) < 1, "a few steps from where they were"
    assert found.fidelity == pytest.approx(held_out_kl(name, found), rel=1e-3)
    assert found.fidelity < held_out_kl(name, start)


@pytest.mark.parametrize("name", ["llama", "phi3_longrope"])
def test_refining_a_ragged_cache_lowers_its_kl(name: str) -> None:
    start, found = refined(name, "reconstruction")
    assert start.counts is not None and found.counts is not None and torch.equal(found.counts, start.counts)
    assert found.fidelity == pytest.approx(held_out_kl(name, found), rel=1e-3)
    assert found.fidelity < 0.9 * held_out_kl(name, start)


def test_a_cache_from_an_adapter_can_be_refined() -> None:
    backbone = make_backbone("llama")
    adapter = Adapter.create(backbone, rank=4, scorer="layer", routed="document", zero_init=False)
    plain = Compressor(backbone, adapter=adapter).compress(TEXT, keep_ratio=0.25)
    compressor = Compressor(backbone, adapter=adapter, refine=SETTINGS)
    found = compressor.compress(TEXT, keep_ratio=0.25)
    assert torch.equal(found.positions, plain.positions) and found.refined_steps > 0
    assert found.fingerprint == compressor.fingerprint() and found.fingerprint.adapter == adapter.sha256


# -- what decides ------------------------------------------------------------------------------------------------------


def test_harmful_steps_leave_the_start_unchanged() -> None:
    start = start_of("llama")
    found = refine("llama", start, settings=replace(SETTINGS, lr=50.0, tolerance=0.02))
    assert found.refined_steps == 0
    assert torch.equal(found.keys, start.keys) and torch.equal(found.values, start.values)
    assert found.fidelity == pytest.approx(held_out_kl("llama", start), rel=1e-3)


class FakeDraft:
    def __init__(self) -> None:
        self.moves = [torch.zeros(2), torch.zeros(2)]


def looked(*looks: dict[str, float]) -> Any:
    progress = Progress(FakeDraft(), [], lr=0.1, draw=None)  # type: ignore[arg-type]
    for step, found in enumerate(looks):
        progress.n_steps = step
        progress.trainable.moves[0].fill_(step)
        progress.look(found, 0.02)  # type: ignore[arg-type]
    return progress


def test_a_state_that_is_worse_on_one_kind_is_not_kept() -> None:
    progress = looked(
        {"question": 1.0, "repetition": 0.1},
        {"question": 0.7, "repetition": 0.102},  # 2 % worse, the most that is allowed
        {"question": 0.2, "repetition": 0.103},
        {"question": math.nan, "repetition": math.nan},
    )
    assert progress.best[:2] == (pytest.approx(0.401), 1)
    assert progress.looks_without_gain == 1  # the mean still fell at the last but one
    progress.back_to_best()
    assert progress.n_steps == 1 and progress.trainable.moves[0].tolist() == [1.0, 1.0]


def test_halving_the_change_can_improve_every_kind() -> None:
    progress = looked({"question": 1.0, "repetition": 0.1}, {"question": 0.2, "repetition": 0.3})
    assert not progress.gained
    progress.halve()
    assert progress.trainable.moves[0].tolist() == [0.5, 0.5]
    progress.look({"question": 0.6, "repetition": 0.1}, 0.02)
    assert progress.gained and progress.best[:2] == (pytest.approx(0.35), 1)
    progress.begin_round()
    assert not progress.gained


def test_non_finite_measurements_keep_the_start() -> None:
    progress = looked({"question": math.nan}, {"question": math.nan})
    assert progress.best[1] == 0


def test_refinement_stops_without_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted_gradients(monkeypatch)
    settings = replace(SETTINGS, lr=50.0, steps=30, evaluate_every=2, patience=2, tolerance=0.02)
    refine("llama", start_of("llama"), settings=settings)
    assert len(calls) == 4


def counted_gradients(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from kv_memory.compress.refine import optimize as module

    calls: list[int] = []
    plain = module._Run._gradients

    def gradients(self: Any, moving: Sequence[Any]) -> None:
        calls.append(len(moving))
        plain(self, moving)

    monkeypatch.setattr(module._Run, "_gradients", gradients)
    return calls


def test_min_fidelity_continues_until_it_is_met_or_max_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    start, once = refined("llama")
    assert once.fidelity is not None
    calls = counted_gradients(monkeypatch)
    never = refine("llama", start, settings=replace(SETTINGS, min_fidelity=1e-6, max_steps=15))
    assert len(calls) == 15 and never.fidelity is not None and never.fidelity <= once.fidelity
    calls.clear()
    met = refine("llama", start, settings=replace(SETTINGS, min_fidelity=once.fidelity * 1.01, max_steps=60))
    assert len(calls) == SETTINGS.steps and met.fidelity == once.fidelity


# -- many documents, long documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "phi3_longrope"])
def test_documents_refined_in_a_batch_match_those_refined_alone(name: str) -> None:
    backbone = shared(name)
    texts = [LONG, letters(100, seed=5)]
    starts = [start_of(name, text=text) for text in texts]
    together = refine_batch(backbone, [backbone.encode(text) for text in texts], starts, settings=SETTINGS)
    for text, start, found in zip(texts, starts, together, strict=True):
        alone = refine(name, start, text)
        assert found.n_tokens == start.n_tokens and found.refined_steps == alone.refined_steps
        # Adam turns the rounding of gradients near zero into steps, so entries differ, and what they say hardly does.
        assert found.fidelity == pytest.approx(alone.fidelity, rel=0.02)


def test_rows_computed_one_by_one_match_batched_rows() -> None:
    start, found = refined("llama")
    slow = refine("llama", start, settings=replace(SETTINGS, max_entries=1))
    assert slow.fidelity == pytest.approx(found.fidelity, rel=0.02)
    assert slow.fingerprint == found.fingerprint


def test_the_same_seed_gives_the_same_bytes() -> None:
    start, found = refined("llama")
    assert refine("llama", start).to_bytes() == found.to_bytes()
    assert refine("llama", start, settings=replace(SETTINGS, seed=1)).to_bytes() != found.to_bytes()


def test_windows_are_refined_separately() -> None:
    backbone = shared_backbone("llama")
    ids = backbone.encode(letters(140, seed=2))
    joined = Compressor(backbone, selector="attention", window_tokens=70, refine=SETTINGS).compress_ids(
        ids, keep_ratio=0.25
    )
    apart = Compressor(backbone, selector="attention", refine=SETTINGS)
    parts = [apart.compress_ids(part, keep_ratio=0.25) for part in (ids[:70], ids[70:])]
    assert torch.equal(joined.keys, torch.cat([part.keys for part in parts], 2))
    assert torch.equal(joined.values, torch.cat([part.values for part in parts], 2))
    assert joined.refined_steps == max(part.refined_steps for part in parts) > 0
    assert joined.fidelity == pytest.approx(sum(part.fidelity or 0 for part in parts) / 2)


def test_the_window_leaves_room_for_probes() -> None:
    backbone = shared_backbone("llama")
    compressor = Compressor(backbone, selector="attention", refine=SETTINGS)
    assert compressor.window_tokens == 512 - len(backbone.prefix_ids) - SETTINGS.extra_tokens
    ids = backbone.encode(letters(450))
    plain = Compressor(backbone, selector="attention").compress_ids(ids, keep_ratio=0.25)
    with pytest.raises(ContextWindowError, match="refining a document of 450 tokens"):
        refine_batch(backbone, [ids], [plain], settings=SETTINGS)


# -- what stays --------------------------------------------------------------------------------------------------------


def test_a_cache_that_keeps_everything_is_returned_unchanged() -> None:
    start = start_of("llama", keep_ratio=1.0)
    assert refine("llama", start) is start
    compressor = Compressor(shared_backbone("llama"), selector="attention", refine=SETTINGS)
    whole = compressor.compress(TEXT, keep_ratio=1.0)
    assert (whole.refined_steps, whole.fidelity) == (0, None)


def test_kept_spans_are_not_changed_by_refinement() -> None:
    backbone = shared_backbone("llama")
    options: dict[str, Any] = {"keep_ratio": 0.2, "keep_spans": [(10, 20)]}
    plain = Compressor(backbone, selector="attention").compress(TEXT, **options)
    found = Compressor(backbone, selector="attention", refine=SETTINGS).compress(TEXT, **options)
    assert found.refined_steps > 0
    held = (plain.positions >= 15) & (plain.positions < 25)  # the wrapper has five tokens
    assert int(held.sum()) == 10 * 4 * 2
    torch.testing.assert_close(found.keys[held], plain.keys[held])
    assert torch.equal(found.values[held], plain.values[held])
    assert not torch.equal(found.values[~held], plain.values[~held])


def test_model_and_start_are_not_modified() -> None:
    backbone = make_backbone("llama")
    start = start_of("llama")
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    kept = start.to_bytes()
    refine_batch(backbone, [backbone.encode(TEXT)], [start], settings=SETTINGS)
    assert start.to_bytes() == kept
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_a_cache_of_another_document_is_rejected() -> None:
    backbone = shared_backbone("llama")
    with pytest.raises(ConfigError, match="cache was made from 70 tokens, but its document has 10"):
        refine_batch(backbone, [backbone.encode(letters(10))], [start_of("llama")], settings=SETTINGS)


def test_unasked_spans_reach_the_probes_as_window_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of characters arrive at the probes as tokens of the window they lie in."""
    seen: list[Any] = []
    monkeypatch.setattr(
        "kv_memory.compress.refine.optimize.make_probes",
        lambda *args, unasked: (seen.append(unasked), made_once(*args, unasked=unasked))[1],
    )
    backbone = shared_backbone("llama")
    compressor = Compressor(backbone, selector="attention", window_tokens=70, refine=SETTINGS)
    text = letters(130, seed=2)  # with its wrapper of 5 and 1 tokens two windows of 68
    compressor.compress(text, keep_ratio=0.25, unasked_spans=[(50, 90)])
    assert seen == [[[(55, 68)]], [[(0, 27)]]]
    with pytest.raises(ConfigError, match="does not lie within") as caught:
        compressor.compress(text, keep_ratio=0.25, unasked_spans=[(50, 900)])
    assert caught.value.where == "unasked_spans"
