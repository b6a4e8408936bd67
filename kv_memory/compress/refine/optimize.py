"""Refinement: gradient steps on kept keys, values and biases until probes are answered as from the full cache.

Selection decides which tokens a cache holds, refinement what their entries contain: the number of entries stays the
same, and the model is not changed. It starts from any cache of a document and needs no adapter. (Cartridges, arXiv
2506.06266, trains such entries from a plain start for hours; from a good start a dozen steps are enough.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress.refine.batching import Row, RowBatch, batch_rows
from kv_memory.compress.refine.loss import Predictions, kl_divergence
from kv_memory.compress.refine.optimizer_state import ProbeTarget, Progress
from kv_memory.compress.refine.probes import ProbeKind, chance, make_probes
from kv_memory.compress.refine.refine_settings import RefineSettings
from kv_memory.compress.refine.teacher import Teacher
from kv_memory.compress.refine.trainable_cache import TrainableCache, TrainableCaches, side_by_side
from kv_memory.errors import ConfigError
from kv_memory.model.backbone import Backbone

_HALVINGS = 2
_LOSS_SCALE = 256.0  # no effect on Adam, but float16 gradients would underflow without it


def refine_batch(
    backbone: Backbone,
    documents: Sequence[Sequence[int]],
    caches: Sequence[DistilledCache],
    *,
    settings: RefineSettings | None = None,
    fixed: Sequence[torch.Tensor | None] | None = None,
    unasked: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> list[DistilledCache]:
    """Refine the caches of several documents, with shared forward passes for their probes.

    Args:
        backbone: Model that made the caches.
        documents: Token ids of each document, wrappers included; each document must fit the context window together
            with `settings.extra_tokens`.
        caches: Cache of each document, prefilled in one piece.
        settings: Settings of the refinement; the defaults if None.
        fixed: Bool `(n_tokens,)` for each document; tokens with entries that are not moved. None for no such tokens.
        unasked: Spans of tokens of each document that no probe quotes.

    Returns:
        New caches, with `refined_steps` and `fidelity`. Entries that no step improved are those of the start. A cache
        that keeps everything has nothing to gain, and is returned unchanged.

    Raises:
        ConfigError: The length of a cache differs from that of its document.
        ContextWindowError: Document and probes do not fit the model.
    """
    # 1. Check lengths and room for the probes.
    settings, unasked = settings or RefineSettings(), unasked or [()] * len(documents)
    fixed = fixed or [None] * len(documents)
    for ids, cache in zip(documents, caches, strict=True):
        if len(ids) != cache.n_tokens:
            raise ConfigError(
                f"the cache was made from {cache.n_tokens} tokens, but its document has {len(ids)}", where="caches"
            )
        n_positions = len(backbone.prefix_ids) + len(ids) + settings.extra_tokens
        backbone.check_positions(n_positions, what=f"refining a document of {len(ids):,} tokens")
    # 2. Leave out caches that keep everything.
    refined = list(caches)
    all_heads = backbone.num_layers * backbone.num_kv_heads * backbone.head_dim
    todo = [index for index, cache in enumerate(caches) if cache.keys.numel() < all_heads * cache.n_tokens]
    # 3. Refine in groups. Where rotary frequencies depend on the length of the sequence, each document is refined
    # alone: beside a longer one it would get the frequencies of that one.
    for group in [[index] for index in todo] if backbone.rope.varies else _groups(backbone, documents, todo, settings):
        run = _Run(backbone, settings, [documents[i] for i in group])
        held, secret = [fixed[i] for i in group], [unasked[i] for i in group]
        for index, cache in zip(group, run.refine([caches[i] for i in group], held, secret), strict=True):
            refined[index] = cache
    return refined


def _groups(
    backbone: Backbone, documents: Sequence[Sequence[int]], todo: Sequence[int], settings: RefineSettings
) -> list[list[int]]:
    """Groups of documents refined together: as many as `max_entries` holds side by side, in order of length."""
    groups: list[list[int]] = []
    for index in sorted(todo, key=lambda i: len(documents[i])):
        size = len(backbone.prefix_ids) + len(documents[index]) + settings.extra_tokens
        if not groups or size * (len(groups[-1]) + 1) > settings.max_entries:
            groups.append([])
        groups[-1].append(index)
    return groups


class _Run:
    """Refinement of a group of documents."""

    def __init__(self, backbone: Backbone, settings: RefineSettings, documents: Sequence[Sequence[int]]) -> None:
        self._backbone = backbone
        self._settings = settings
        self._documents = documents
        self._n_positions = len(backbone.prefix_ids) + max(map(len, documents))

    @torch.no_grad()
    def refine(
        self,
        caches: Sequence[DistilledCache],
        fixed: Sequence[torch.Tensor | None],
        unasked: Sequence[Sequence[tuple[int, int]]],
    ) -> list[DistilledCache]:
        """Prepare the probes, run the rounds, and return each document's best state."""
        # 1. Probes, with the predictions of the full cache.
        settings = self._settings
        asked = self._prepare(unasked)
        # 2. Trainable caches, evaluated at the start.
        going = []
        for ids, cache, own, held_fast in zip(self._documents, caches, asked, fixed, strict=True):
            trainable = TrainableCache(self._backbone, cache, n_positions=self._n_positions, fixed=held_fast)
            draw = chance(settings.seed, ids, "order")
            going.append(Progress(trainable, own, lr=self._rate_for(trainable, len(ids)), draw=draw))
        self._look(going)
        # 3. Rounds, each with half the rate of the last, for documents that have not reached `min_fidelity`.
        active, rate, n_done = list(going), 1.0, 0
        while active and n_done < settings.max_steps:
            n_steps = min(settings.steps, settings.max_steps - n_done)
            self._round(active, n_steps, rate)
            n_done, rate = n_done + n_steps, rate / 2
            wanted = settings.min_fidelity
            active = [p for p in active if wanted is not None and p.best[0] > wanted]
        return [self._result(progress) for progress in going]

    def _rate_for(self, trainable: TrainableCache, n_tokens: int) -> float:
        if self._settings.lr is not None:
            return self._settings.lr
        share = int(trainable.counts.sum()) / (trainable.counts.numel() * n_tokens)
        return min(0.05, max(0.005, 0.01 * 0.125 / share))

    def _prepare(self, unasked: Sequence[Sequence[tuple[int, int]]]) -> list[list[ProbeTarget]]:
        settings = self._settings
        # The teacher stays local, so that its caches are freed before trainables are made.
        teacher = Teacher(self._backbone, self._documents, room=settings.extra_tokens, max_entries=settings.max_entries)
        probes = make_probes(self._backbone, teacher, self._documents, settings.probes, unasked=unasked)
        every = [probe for own in probes for probe in own]
        taught: dict[int, Predictions | torch.Tensor] = {}
        for index, logits in teacher.logits([probe.row for probe in every]):
            taught[index] = logits if every[index].held_out else Predictions.of(logits)
        asked = iter([ProbeTarget(probe, taught[index]) for index, probe in enumerate(every)])
        return [[next(asked) for _ in own] for own in probes]

    def _round(self, active: Sequence[Progress], n_steps: int, rate: float) -> None:
        """Run steps from the best state so far, with a fresh optimiser, until the end or until nothing is gained."""
        # 1. Steps, with an evaluation every `evaluate_every` steps and at the end.
        settings = self._settings
        for progress in active:
            progress.begin_round()
        for step in range(n_steps):
            moving = [progress for progress in active if not progress.stopped]
            if not moving:
                break
            self._gradients(moving)
            for progress in moving:
                progress.step(rate * (1 - step / n_steps))
            if (step + 1) % settings.evaluate_every == 0 or step + 1 == n_steps:
                self._look([progress for progress in moving if not progress.stopped])
                for progress in moving:
                    progress.stopped |= progress.looks_without_gain >= settings.most_looks_without_gain
        # 2. Without a gain, try part of the way: the whole way may be too far for just one of the kinds.
        for _ in range(_HALVINGS):
            failed = [progress for progress in active if not progress.gained]
            for progress in failed:
                progress.halve()
            self._look(failed)
        # 3. Return to the best state.
        for progress in active:
            progress.back_to_best()

    def _gradients(self, moving: Sequence[Progress]) -> None:
        """Add the gradient of one step to the trainables; the loss of a document is the mean over its probes."""
        # 1. Probes of this step, and the number of probes of each document.
        chosen = [(i, a) for i, p in enumerate(moving) for a in p.next_probes(self._settings.probes_per_step)]
        sizes = [sum(i == j for j, _ in chosen) for i in range(len(moving))]
        # 2. Gradients of each batch at the entries: a fresh graph for each, and the head's part row by row.
        trainables = [progress.trainable for progress in moving]
        together = side_by_side(self._backbone, trainables, n_positions=self._n_positions)
        rows = [replace(asked.probe.row, document=i) for i, asked in chosen]
        for batch in self._batches(rows, together):
            with torch.enable_grad():
                graph = together.leaves()
                hidden = batch.hidden(self._backbone, graph.cache(batch.documents))
                parts = [(chosen[i][1], rows[i].n_wanted * sizes[rows[i].document]) for i in batch.index]
                leaves = [*graph.keys, *graph.values, *(graph.bias or ())]
                found = torch.autograd.grad(hidden, leaves, self._before_head(hidden, parts))
            # 3. The part of each document, added to its trainable.
            n = self._backbone.num_layers
            for index in sorted(set(batch.documents.tolist())):
                parts_of = [found[:n], found[n : 2 * n], found[2 * n :]]  # keys, values, biases
                trainables[index].add_gradient([together.entries_of(index, own) for own in parts_of])

    def _before_head(self, hidden: torch.Tensor, parts: Sequence[tuple[ProbeTarget, int]]) -> torch.Tensor:
        """Gradient of the loss at `hidden`, the input of the head: row by row, as logits of all rows at once are large.

        `parts` are the probe and the divisor of the loss for each row.
        """
        gradients: list[torch.Tensor] = []
        for (asked, divisor), part in zip(parts, hidden.split([a.probe.row.n_wanted for a, _ in parts]), strict=True):
            assert isinstance(asked.taught, Predictions)
            seen = part.detach().requires_grad_()  # (n_wanted of the row, hidden_size)
            losses = asked.taught.loss(self._backbone.head(seen), forward_weight=self._settings.forward_weight)
            gradients += torch.autograd.grad(losses.sum() * (_LOSS_SCALE / divisor), [seen])
        return torch.cat(gradients)

    def _look(self, going: Sequence[Progress]) -> None:
        """Evaluate the held-out probes."""
        if not going:
            return
        # 1. Run the held-out probes of all documents in shared batches.
        chosen = [(i, asked) for i, progress in enumerate(going) for asked in progress.held_out]
        together = side_by_side(self._backbone, [p.trainable for p in going], n_positions=self._n_positions)
        rows = [replace(asked.probe.row, document=i) for i, asked in chosen]
        found: dict[int, float] = {}
        for batch in self._batches(rows, together):
            hidden = batch.hidden(self._backbone, together.entries.cache(batch.documents))
            for i, part in zip(batch.index, hidden.split([rows[i].n_wanted for i in batch.index]), strict=True):
                taught = chosen[i][1].taught
                assert isinstance(taught, torch.Tensor)
                found[i] = float(kl_divergence(taught, self._backbone.head(part)).mean())
        # 2. Average the KL of each document by kind.
        for i, progress in enumerate(going):
            by_kind: dict[ProbeKind, list[float]] = {}
            for number, (owner, asked) in enumerate(chosen):
                if owner == i:
                    by_kind.setdefault(asked.probe.kind, []).append(found[number])
            progress.look({kind: sum(own) / len(own) for kind, own in by_kind.items()}, self._settings.tolerance)

    def _batches(self, rows: Sequence[Row], together: TrainableCaches) -> list[RowBatch]:
        at_once = max(1, int(self._settings.max_entries / (together.n_entries + self._settings.extra_tokens)))
        return batch_rows(self._backbone, rows, together.entries.next_positions.tolist(), at_once=at_once)

    def _result(self, progress: Progress) -> DistilledCache:
        fidelity, n_steps, _ = progress.best
        cache = progress.trainable.result() if n_steps else progress.trainable.cache
        method = f"{cache.fingerprint.method}|{self._settings.name}"
        return replace(
            cache,
            fingerprint=replace(cache.fingerprint, method=method, format_version=2),
            refined_steps=n_steps,
            fidelity=max(0.0, fidelity) if math.isfinite(fidelity) else None,  # rounding may go below zero
        )
