"""Evaluation during training: the divergence of answers from a distilled cache from those of the full cache.

It is measured on held-out examples, at fixed keep ratios, over the teacher's own answers, and decides which checkpoint
is the best. `kv-memory eval` measures more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.kept import pad, top_k_mask
from kv_memory.compress.prefill import prefill_documents
from kv_memory.compress.refine.batching import Entries, gather_entries
from kv_memory.compress.refine.loss import kl_divergence
from kv_memory.compress.restore import drop_restore_tokens
from kv_memory.compress.selectors import Reconstruction
from kv_memory.config import check_keep_ratio, n_kept_for
from kv_memory.datasets import Example
from kv_memory.errors import ConfigError
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache
from kv_memory.train.batches import Batches
from kv_memory.train.restored import output_selector, restore_scores, restored_entries
from kv_memory.train.settings import TrainSettings
from kv_memory.train.step import WeightedRows, answered_rows, weighted_rows

# Token ids and length of a document, and the rows behind it with the teacher's answers.
_Case = tuple[torch.Tensor, torch.Tensor, list[WeightedRows]]


class HeldOut:
    """Measures an adapter on held-out examples; those without questions, on spans of their own text.

    Documents and answers have the lengths of the run's settings.

    Raises:
        ConfigError: A keep ratio is outside (0, 1], or no keep ratio is given.
    """

    def __init__(
        self, examples: Sequence[Example], backbone: Backbone, settings: TrainSettings, *, ratios: Sequence[float]
    ) -> None:
        if not ratios:
            raise ConfigError("evaluation needs at least one keep ratio", where="eval_ratios")
        self.ratios = tuple(check_keep_ratio(ratio, where="eval_ratios") for ratio in ratios)
        self.n_documents = len(examples)
        self._backbone = backbone
        # Documents, spans and answers must not depend on the training data or the seed of the run.
        self._settings = replace(
            settings,
            seed=0,
            answers="teacher",
            batch_documents=1,
            composition_share=0.0,
            question_weight=0.0,
            questions_per_document=max(1, settings.questions_per_document),
            spans_per_document=0,
        )
        self._batches = Batches(examples, backbone, self._settings)
        self._cases: list[_Case] = []

    @torch.no_grad()
    def measure(self, adapter: Adapter | None = None) -> dict[float, float]:
        """KL(full ‖ distilled) by keep ratio, in nats per token, the mean over documents.

        Without an adapter, it is that of a selector that needs no training: of reconstruction, or where restore tokens
        are trained, of output errors. The latter choose among the restore tokens too, and nothing is fitted: this is
        not yet what `matched` makes of them, but hundreds of evaluations would wait for its fits.
        """
        backbone, total = self._backbone, dict.fromkeys(self.ratios, 0.0)
        restores = self._settings.restore_tokens
        part_tokens = min(1024, backbone.context_window // 4)
        selector = output_selector(backbone) if restores else Reconstruction(part_tokens=part_tokens)
        for ids, lengths, rows in self._prepared():
            taught = self._taught(rows, gather_entries(backbone, self._prefilled(ids)))
            if restores and adapter is not None:
                cache = self._prefilled(ids, room=selector.extra_tokens + restores)
                errors = restore_scores(adapter, ids, lengths, cache)
            for ratio in self.ratios:
                n_kept = torch.tensor([n_kept_for(ids.shape[1], ratio)], device=ids.device)
                if adapter is None:
                    cache = backbone.prefixed_cache(ids.shape[1], room=selector.extra_tokens)
                    scores = selector.score(backbone, ids, cache)[:, None]
                    selected = top_k_mask(scores, lengths, n_kept, budget=selector.budget)
                    kept = gather_entries(backbone, cache, selected)
                elif restores:
                    kept = restored_entries(adapter, cache, errors, n_kept)
                    drop_restore_tokens(adapter, cache)
                else:
                    done = prefill_documents(adapter, ids, lengths, n_kept)
                    kept = gather_entries(backbone, done.cache, done.selected)
                total[ratio] += self._kl(rows, taught, kept) / self.n_documents
        return total

    @torch.no_grad()
    def none(self) -> float:
        """KL without any document, the worst case; otherwise as in `measure`."""
        total = 0.0
        for ids, _, rows in self._prepared():
            cache = self._prefilled(ids)
            taught = self._taught(rows, gather_entries(self._backbone, cache))
            nothing = torch.zeros_like(ids, dtype=torch.bool)[None, :, None]  # the question keeps its positions
            total += self._kl(rows, taught, gather_entries(self._backbone, cache, nothing))
        return total / self.n_documents

    def _taught(self, parts: list[WeightedRows], full: Entries) -> list[torch.Tensor]:
        # Recomputed for each document and evaluation: stored, the logits would take megabytes per document.
        return [part.ask(self._backbone, full) for part in parts]

    def _kl(self, parts: list[WeightedRows], taught: list[torch.Tensor], kept: Entries) -> float:
        total = 0.0
        for part, teacher in zip(parts, taught, strict=True):
            kl = kl_divergence(teacher, part.ask(self._backbone, kept))
            total += float((kl * part.weights).sum())
        return total / sum(float(part.weights.sum()) for part in parts)

    def _prefilled(self, ids: torch.Tensor, *, room: int = 0) -> PositionedCache:
        cache = self._backbone.prefixed_cache(ids.shape[1], room=room)
        self._backbone.prefill(ids, cache)
        return cache

    def _prepared(self) -> list[_Case]:
        """The documents with the teacher's answers, which are decoded only once."""
        for number in range(len(self._cases), self.n_documents):
            batch = self._batches.batch(number)
            ids, lengths = pad(batch.documents, device=self._backbone.device)
            full = gather_entries(self._backbone, self._prefilled(ids))
            rows = answered_rows(batch, full, self._backbone, self._settings)
            self._cases.append((ids, lengths, weighted_rows(rows, full, self._backbone, self._settings)))
        return self._cases
