"""Entries: what follows several documents at once sees what it would see behind each of them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kv_memory.compress import Adapter, Compressor
from kv_memory.compress.kept import pad
from kv_memory.compress.prefill import prefill_documents
from kv_memory.compress.refine.batching import RowBatch, gather_entries, join_entries
from kv_memory.generate import compose
from tests.conftest import make_backbone
from tests.reference import assert_close, letters, shared_backbone

NAMES = ["llama", "gemma2", "gemma3", "phi3_window", "phi3_longrope"]
DOCUMENTS = [letters(30, seed=1), letters(45, seed=2), letters(20, seed=3)]
QUESTION = letters(12, seed=9)


def asked(backbone: Any, rows: list[int]) -> RowBatch:
    """The question behind each document of `rows`, with every token wanted."""
    ids = torch.tensor([backbone.encode(QUESTION)] * len(rows))
    lengths = torch.full((len(rows),), ids.shape[1])
    return RowBatch(list(range(len(rows))), ids, lengths, torch.tensor(rows), torch.ones_like(ids, dtype=torch.bool))


def every(backbone: Any, rows: list[int], entries: Any) -> torch.Tensor:
    """Logits after every token of the question, behind each document of `rows`: `(rows, n, vocab_size)`."""
    batch = asked(backbone, rows)
    with torch.no_grad():
        return entries.ask(backbone, batch).unflatten(0, batch.ids.shape)


def alone(backbone: Any, caches: list[Any]) -> torch.Tensor:
    """Logits after every token of the question behind composed caches: `(n, vocab_size)`."""
    ids = torch.tensor([backbone.encode(QUESTION)])
    with torch.no_grad():
        return backbone.logits(ids, compose(backbone, caches, n_question=ids.shape[1]), every=True)[0]


def read(backbone: Any) -> tuple[Any, torch.Tensor]:
    ids, lengths = pad([backbone.encode(text) for text in DOCUMENTS], device="cpu")
    cache = backbone.prefixed_cache(ids.shape[1], batch_size=3)
    with torch.no_grad():
        backbone.prefill(ids, cache, lengths=lengths)
    return cache, lengths


def plain(backbone: Any) -> list[Any]:
    compressor = Compressor(backbone, selector="sink_recent")
    return [compressor.compress_ids(backbone.encode(text), keep_ratio=1) for text in DOCUMENTS]


@pytest.mark.parametrize("name", NAMES)
def test_padded_documents_give_the_logits_of_single_ones(name: str) -> None:
    backbone = shared_backbone(name)
    cache, _ = read(backbone)
    logits = every(backbone, [2, 0, 1, 0], gather_entries(backbone, cache))
    caches = plain(backbone)
    for row, document in zip(logits, [2, 0, 1, 0], strict=True):
        assert_close(row, alone(backbone, [caches[document]]))


@pytest.mark.parametrize("name", NAMES)
def test_joined_documents_give_the_logits_of_composed_caches(name: str) -> None:
    backbone = shared_backbone(name)
    cache, lengths = read(backbone)
    groups = [(2, 0), (1,)]
    entries = join_entries(backbone, gather_entries(backbone, cache), lengths, groups)
    logits = every(backbone, [0, 1], entries)
    caches = plain(backbone)
    for row, group in zip(logits, groups, strict=True):
        assert_close(row, alone(backbone, [caches[index] for index in group]))


FORMS: dict[str, dict[str, Any]] = {
    "paper": {"scorer": "token"},
    "head": {"scorer": "head"},
    "head, ragged": {"scorer": "head", "budget": "model"},
    "layer": {"scorer": "layer"},
    "layer, document": {"scorer": "layer", "routed": "document"},
    "layer, document, ragged": {"scorer": "layer", "routed": "document", "budget": "model"},
}


@pytest.mark.parametrize(
    ("name", "form"),
    [("llama", form) for form in FORMS]
    + [(name, "layer, document, ragged") for name in ("mistral", "gemma2", "phi3_longrope")],
)
def test_training_prefill_equals_the_compressor(name: str, form: str) -> None:
    """Selected and routed entries of a padded batch answer as the distilled caches of the single documents."""
    backbone = make_backbone(name)
    adapter = Adapter.create(backbone, rank=4, zero_init=False, **FORMS[form])
    ids, lengths = pad([backbone.encode(text) for text in DOCUMENTS], device="cpu")
    n_kept = torch.tensor([8, 11, 5])  # a quarter of each
    with torch.no_grad():
        reading = prefill_documents(adapter, ids, lengths, n_kept)
    entries = gather_entries(backbone, reading.cache, reading.selected, reading.scores - reading.scores.detach())
    groups = [(1, 2), (0,)]
    together = every(backbone, [0, 1], join_entries(backbone, entries, lengths, groups))
    compressor = Compressor(backbone, adapter=adapter)
    caches = [compressor.compress_ids(backbone.encode(text), keep_ratio=0.25) for text in DOCUMENTS]
    assert [cache.n_kept for cache in caches] == n_kept.tolist()
    for row, group in zip(together, groups, strict=True):
        assert_close(row, alone(backbone, [caches[index] for index in group]))


@pytest.mark.parametrize(
    ("name", "scorer"), [("llama", "token"), ("llama", "head"), ("llama", "layer"), ("gemma2", "layer")]
)
def test_score_bias_is_zero_but_carries_a_gradient(name: str, scorer: Any) -> None:
    backbone = make_backbone(name)
    adapter = Adapter.create(backbone, rank=4, scorer=scorer)
    adapter.scorer.requires_grad_(True)
    ids, lengths = pad([backbone.encode(text) for text in DOCUMENTS], device="cpu")
    reading = prefill_documents(adapter, ids, lengths, torch.tensor([8, 11, 5]))
    without = gather_entries(backbone, reading.cache, reading.selected)
    biased = gather_entries(backbone, reading.cache, reading.selected, reading.scores - reading.scores.detach())
    assert_close(every(backbone, [0, 1, 2], biased), every(backbone, [0, 1, 2], without))
    logits = biased.ask(backbone, asked(backbone, [0, 1, 2]))
    logits.log_softmax(-1)[:, 7].sum().backward()
    for parameter in adapter.scorer.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
