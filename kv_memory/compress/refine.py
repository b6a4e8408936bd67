"""Refinement: the kept keys and values of a document are moved until probes are answered as from the full cache.

Selection says which tokens a cache holds, refinement what is written into their places: the entries stay as many, and
the model is not touched. It starts from any cache of a document and needs no adapter. (Cartridges, arXiv 2506.06266,
trains such entries from a plain start for hours; from a good start a dozen steps are enough.)
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from kv_memory.backbone import Backbone
from kv_memory.cache import DistilledCache
from kv_memory.compress.divergence import distillation_loss, kl_divergence
from kv_memory.compress.draft import Draft, Drafts, side_by_side
from kv_memory.compress.probes import KINDS, SHARES, Probe, ProbeKind, chance, make_probes, probe_room
from kv_memory.compress.rows import Row, RowBatch, batch_rows
from kv_memory.compress.teacher import Teacher
from kv_memory.errors import ConfigError

__all__ = ["RefineSettings", "refine_batch"]

RECIPE = 1  # raised when the same settings give another result; part of the fingerprint
_LOSS_SCALE = 256.0  # Adam does not see it, float16 gradients would vanish without


@dataclass(frozen=True, kw_only=True)
class RefineSettings:
    """How caches are refined. All of it but the memory limit decides the result, and is part of the fingerprint.

    Attributes:
        steps: Gradient steps, at most; fewer where held-out probes no longer gain.
        lr: Of Adam, in standard deviations of each layer's keys and values; falls linearly to 0.
        n_probes: Prepared for each document, to practise; see `make_probes`.
        probes_per_step: Of these, asked in one step, of every kind.
        n_held_out: Probes of every kind that are never practised and decide what is kept.
        probe_tokens: The longest span or statement.
        forward_weight: λ of the loss, see `distillation_loss`.
        temperature: At which the model's questions and statements are sampled.
        evaluate_every: Steps between looks at the held-out probes.
        patience: Looks without a gain after which to stop.
        tolerance: How much worse than the start the result may be on any kind of held-out probe, as a share.
        min_fidelity: Go on, in further rounds of `steps` with half the `lr`, until the held-out KL in nats is at most
            this; None for one round.
        max_steps: Where to give up on that.
        seed: Of all chance.
        max_entries: Cache entries that rows side by side may take, in tokens; what is longer is read row by row.
    """

    steps: int = 16
    lr: float = 0.03
    n_probes: int = 12
    probes_per_step: int = 12
    n_held_out: int = 1
    probe_tokens: int = 60
    forward_weight: float = 1.0
    temperature: float = 0.5
    evaluate_every: int = 4
    patience: int = 2
    tolerance: float = 0.02
    min_fidelity: float | None = None
    max_steps: int = 64
    seed: int = 0
    max_entries: int = 4096

    def __post_init__(self) -> None:
        checks = {
            "steps": (self.steps >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "n_probes": (self.n_probes >= len(KINDS), f"at least {len(KINDS)}, one of every kind"),
            "probes_per_step": (self.probes_per_step >= 1, "at least 1"),
            "n_held_out": (self.n_held_out >= 1, "at least 1"),
            "probe_tokens": (self.probe_tokens >= 16, "at least 16"),
            "forward_weight": (0 <= self.forward_weight <= 1, "in [0, 1]"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "evaluate_every": (self.evaluate_every >= 1, "at least 1"),
            "patience": (self.patience >= 1, "at least 1"),
            "tolerance": (self.tolerance >= 0, "0 or more"),
            "min_fidelity": (self.min_fidelity is None or self.min_fidelity > 0, "above 0, or None"),
            "max_steps": (self.max_steps >= self.steps, "at least steps"),
            "max_entries": (self.max_entries >= 1, "at least 1"),
        }
        for name, (ok, wanted) in checks.items():
            if not ok:
                raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)!r}", where=name)

    @property
    def name(self) -> str:
        """For the fingerprint: the steps for people, and a digest of all that decides the result."""
        values = {**asdict(self), "recipe": RECIPE}
        del values["max_entries"]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return f"refine:{self.steps}:{digest[:12]}"

    @property
    def extra_tokens(self) -> int:
        """How many tokens refinement puts behind a document, at most."""
        return probe_room(self.probe_tokens)


def refine_batch(
    backbone: Backbone,
    documents: Sequence[Sequence[int]],
    caches: Sequence[DistilledCache],
    *,
    settings: RefineSettings | None = None,
    fixed: Sequence[torch.Tensor | None] | None = None,
) -> list[DistilledCache]:
    """Refine the caches of several documents, whose probes share forward passes.

    Args:
        backbone: The model that made the caches.
        documents: The documents as token ids, in their wrappers; each fits the context window together with
            `settings.extra_tokens`.
        caches: One of each document, read in one piece.
        settings: See `RefineSettings`.
        fixed: For each document a bool `(n_tokens,)`: tokens whose entries are not moved; None for none.

    Returns:
        New caches, with `refined_steps` and `fidelity`; entries that no step improved are those of the start. Where
        everything was kept there is nothing to gain, and the cache is the one that was given.

    Raises:
        ConfigError: A cache is of another length than its document.
        ContextWindowError: Document and probes do not fit the model.
    """
    settings = settings or RefineSettings()
    held_fast = [None] * len(documents) if fixed is None else list(fixed)
    for ids, cache in zip(documents, caches, strict=True):
        if len(ids) != cache.n_tokens:
            raise ConfigError(f"the cache is of {cache.n_tokens} tokens, its document has {len(ids)}", where="caches")
        n_positions = len(backbone.prefix_ids) + len(ids) + settings.extra_tokens
        backbone.check_positions(n_positions, what=f"refining a document of {len(ids):,} tokens")
    refined = list(caches)
    all_heads = backbone.num_layers * backbone.num_kv_heads * backbone.head_dim
    todo = [index for index, cache in enumerate(caches) if cache.keys.numel() < all_heads * cache.n_tokens]
    # Where frequencies depend on the length of the sequence, a short document beside a long one would be read with the
    # long one's.
    for group in [[index] for index in todo] if backbone.rope.varies else _groups(backbone, documents, todo, settings):
        run = _Run(backbone, [documents[i] for i in group], [caches[i] for i in group], settings)
        for index, cache in zip(group, run.refine([held_fast[i] for i in group]), strict=True):
            refined[index] = cache
    return refined


def _groups(
    backbone: Backbone, documents: Sequence[Sequence[int]], todo: Sequence[int], settings: RefineSettings
) -> list[list[int]]:
    """Documents refined together: as many as `max_entries` holds beside each other, in order of length."""
    groups: list[list[int]] = []
    for index in sorted(todo, key=lambda i: len(documents[i])):
        size = len(backbone.prefix_ids) + len(documents[index]) + settings.extra_tokens
        if not groups or size * (len(groups[-1]) + 1) > settings.max_entries:
            groups.append([])
        groups[-1].append(index)
    return groups


@dataclass(frozen=True)
class _Asked:
    """A probe and what the full cache predicts: `(n_wanted, vocab_size)`."""

    probe: Probe
    logits: torch.Tensor


class _Progress:
    """One document's way: its draft, its optimiser, and the best state so far."""

    def __init__(self, draft: Draft, asked: Sequence[_Asked], *, draw: random.Random) -> None:
        self.draft = draft
        self.practised = [a for a in asked if not a.probe.held_out]
        self.held_out = [a for a in asked if a.probe.held_out]
        self.n_steps = 0
        self.start: dict[ProbeKind, float] = {}
        self.best: tuple[float, int, list[torch.Tensor]] = (math.inf, 0, [])
        self.looks_without_gain = 0
        self.stopped = False
        self.optimizer: torch.optim.Optimizer | None = None
        self._draw = draw
        self._queues: dict[ProbeKind, list[_Asked]] = {kind: [] for kind in KINDS}

    def next_probes(self, n: int) -> list[_Asked]:
        """About `n` probes, of every kind by its share; all of a kind come once before any comes again."""
        chosen: list[_Asked] = []
        for kind, queue in self._queues.items():
            own = [asked for asked in self.practised if asked.probe.kind == kind]
            for _ in range(min(len(own), max(1, round(n * SHARES[kind])))):
                if not queue:
                    queue += own
                    self._draw.shuffle(queue)
                chosen.append(queue.pop())
        return chosen

    def look(self, found: dict[ProbeKind, float], tolerance: float) -> None:
        """Take note of the held-out KL of every kind."""
        mean = sum(found.values()) / len(found)
        if not self.start:
            self.start, self.best = found, (mean, 0, [move.clone() for move in self.draft.moves])
            return
        worse = any(not kl <= self.start[kind] * (1 + tolerance) for kind, kl in found.items())
        if mean < self.best[0] and not worse:
            self.best = mean, self.n_steps, [move.clone() for move in self.draft.moves]
            self.looks_without_gain = 0
        else:
            self.looks_without_gain += 1

    def back_to_best(self) -> None:
        """Forget what brought nothing."""
        for move, best in zip(self.draft.moves, self.best[2], strict=True):
            move.copy_(best)
        self.n_steps = self.best[1]


class _Run:
    """Documents that are refined together."""

    def __init__(
        self,
        backbone: Backbone,
        documents: Sequence[Sequence[int]],
        caches: Sequence[DistilledCache],
        settings: RefineSettings,
    ) -> None:
        self._backbone = backbone
        self._documents = documents
        self._caches = caches
        self._settings = settings
        self._n_positions = len(backbone.prefix_ids) + max(map(len, documents))

    @torch.no_grad()
    def refine(self, fixed: Sequence[torch.Tensor | None]) -> list[DistilledCache]:
        """Prepare, move, and give back the best."""
        settings = self._settings
        asked = self._prepare()
        going = [
            _Progress(
                Draft(self._backbone, cache, n_positions=self._n_positions, fixed=held_fast),
                own,
                draw=chance(settings.seed, ids, "order"),
            )
            for ids, cache, own, held_fast in zip(self._documents, self._caches, asked, fixed, strict=True)
        ]
        self._look(going)
        active, lr, n_done = list(going), settings.lr, 0
        while active and n_done < settings.max_steps:
            n_steps = min(settings.steps, settings.max_steps - n_done)
            self._round(active, n_steps, lr)
            n_done, lr = n_done + n_steps, lr / 2
            wanted = settings.min_fidelity
            active = [p for p in active if wanted is not None and p.best[0] > wanted]
        return [self._result(progress) for progress in going]

    def _prepare(self) -> list[list[_Asked]]:
        settings = self._settings
        # The teacher's caches are freed before drafts are made.
        teacher = Teacher(self._backbone, self._documents, room=settings.extra_tokens, max_entries=settings.max_entries)
        probes = make_probes(
            self._backbone,
            teacher,
            self._documents,
            n_probes=settings.n_probes,
            n_held_out=settings.n_held_out,
            probe_tokens=settings.probe_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
        )
        logits = iter(teacher.logits([probe.row for own in probes for probe in own]))
        return [[_Asked(probe, next(logits)) for probe in own] for own in probes]

    def _round(self, active: Sequence[_Progress], n_steps: int, lr: float) -> None:
        """Steps from the best state so far, with a fresh optimiser, until the end or until nothing is gained."""
        settings = self._settings
        for progress in active:
            progress.looks_without_gain, progress.stopped = 0, False
            progress.optimizer = self._optimizer(progress.draft, lr)
        for step in range(n_steps):
            moving = [progress for progress in active if not progress.stopped]
            if not moving:
                break
            self._gradients(moving)
            for progress in moving:
                assert progress.optimizer is not None
                if not all(bool(m.grad.isfinite().all()) for m in progress.draft.moves if m.grad is not None):
                    progress.stopped = True  # the best state so far is what is left
                    continue
                for group in progress.optimizer.param_groups:
                    group["lr"] = lr * (1 - step / n_steps)
                progress.optimizer.step()
                progress.optimizer.zero_grad()
                progress.n_steps += 1
            if (step + 1) % settings.evaluate_every == 0 or step + 1 == n_steps:
                self._look([progress for progress in moving if not progress.stopped])
                for progress in moving:
                    progress.stopped |= progress.looks_without_gain >= settings.patience
        for progress in active:
            progress.back_to_best()

    def _optimizer(self, draft: Draft, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(draft.moves, lr=lr)

    def _gradients(self, moving: Sequence[_Progress]) -> None:
        """The gradient of one step into the drafts; the loss of a document is the mean over its probes."""
        chosen = [(i, a) for i, p in enumerate(moving) for a in p.next_probes(self._settings.probes_per_step)]
        sizes = [sum(i == j for j, _ in chosen) for i in range(len(moving))]
        drafts = [progress.draft for progress in moving]
        together = side_by_side(self._backbone, drafts, n_positions=self._n_positions)
        rows = [replace(asked.probe.row, document=i) for i, asked in chosen]
        for batch in self._batches(rows, together):
            with torch.enable_grad():
                graph = together.require_grad()
                logits = graph.ask(self._backbone, batch)
                taught = torch.cat([chosen[i][1].logits for i in batch.index])
                losses = distillation_loss(taught, logits, forward_weight=self._settings.forward_weight)
                counted = [(rows[i].n_wanted, sizes[rows[i].document]) for i in batch.index]
                weights = torch.tensor([1 / (n * size) for n, size in counted for _ in range(n)], device=losses.device)
                loss = (losses * weights).sum() * _LOSS_SCALE
                found = torch.autograd.grad(loss, [*graph.keys, *graph.values])
            n_layers = self._backbone.num_layers
            for index in sorted(set(batch.documents.tolist())):
                drafts[index].add_gradient([graph.entries_of(index, g) for g in (found[:n_layers], found[n_layers:])])

    def _look(self, going: Sequence[_Progress]) -> None:
        """Ask the held-out probes."""
        if not going:
            return
        chosen = [(i, asked) for i, progress in enumerate(going) for asked in progress.held_out]
        together = side_by_side(self._backbone, [p.draft for p in going], n_positions=self._n_positions)
        rows = [replace(asked.probe.row, document=i) for i, asked in chosen]
        found: dict[int, float] = {}
        for batch in self._batches(rows, together):
            logits = together.ask(self._backbone, batch)
            parts = logits.split([rows[i].n_wanted for i in batch.index])
            for i, part in zip(batch.index, parts, strict=True):
                found[i] = float(kl_divergence(chosen[i][1].logits, part).mean())
        for i, progress in enumerate(going):
            by_kind: dict[ProbeKind, list[float]] = {}
            for number, (owner, asked) in enumerate(chosen):
                if owner == i:
                    by_kind.setdefault(asked.probe.kind, []).append(found[number])
            progress.look({kind: sum(own) / len(own) for kind, own in by_kind.items()}, self._settings.tolerance)

    def _batches(self, rows: Sequence[Row], drafts: Drafts) -> list[RowBatch]:
        at_once = max(1, int(self._settings.max_entries / (drafts.n_entries + self._settings.extra_tokens)))
        rope, ends = self._backbone.rope, drafts.next_positions.tolist()

        def regime(row: Row) -> Hashable:  # padding would lengthen a row into other frequencies
            return rope.regime(ends[row.document] + len(row.ids))

        return batch_rows(rows, at_once=at_once, device=self._backbone.device, kind=regime if rope.varies else None)

    def _result(self, progress: _Progress) -> DistilledCache:
        fidelity, n_steps, _ = progress.best
        cache = progress.draft.result() if n_steps else progress.draft.cache
        method = f"{cache.fingerprint.method}|{self._settings.name}"
        return replace(
            cache,
            fingerprint=replace(cache.fingerprint, method=method),
            refined_steps=n_steps,
            fidelity=max(0.0, fidelity) if math.isfinite(fidelity) else None,  # rounding may go below zero
        )
