"""Settings of the refinement of caches."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from kv_memory.compress.refine.probes import KINDS, ProbeSettings
from kv_memory.errors import ConfigError

RECIPE = 3  # incremented when the same settings give another result; part of the fingerprint
_STEPS = 48
_FEW_STEPS = 24  # below, making and evaluating probes would cost more than the steps
_LEAST_PROBES, _LEAST_OF_FEW = 24, 8


@dataclass(frozen=True, kw_only=True)
class RefineSettings:
    """Settings of the refinement of caches; all but `max_entries` decide the result, and are part of the fingerprint.

    Attributes:
        steps: Most gradient steps of a round; fewer where held-out probes no longer gain.
        lr: Learning rate of Adam, in standard deviations of each layer's keys and values; falls linearly to 0. None:
            0.01 where an eighth of the entries is kept and in inverse proportion elsewhere, in 0.005 to 0.05: the
            fewer entries there are, the further each is from its best place.
        n_probes: Number of training probes prepared for each document, see `make_probes`. None: half as many as steps,
            so that each is used about eight times however many steps there are, but at least 24, or 8 where there are
            fewer steps than 24.
        probes_per_step: Number of training probes used in one step, every kind among them.
        n_held_out: Number of held-out spans of either kind, with three times as many questions and statements.
            Held-out probes are never trained on, and decide which state is kept. None: 2, or 1 where there are fewer
            steps than 24.
        probe_tokens: Longest span or statement, in tokens.
        forward_weight: λ of the loss, see `distillation_loss`.
        temperature: Sampling temperature of the model's questions and statements.
        evaluate_every: Steps between evaluations of the held-out probes.
        patience: Evaluations without a gain after which a round stops, for 48 steps. With more steps it grows in
            proportion, because the rate then falls more slowly, and with it the fluctuation of the held-out results.
        tolerance: Share by which the result may be worse than the start on any kind of held-out probe.
        min_fidelity: Highest held-out KL in nats to accept: further rounds of `steps`, each with half the `lr` of the
            last, run until it is reached; None for one round.
        max_steps: Most steps of all rounds together.
        seed: Seed of all random choices.
        max_entries: Most cache entries that rows side by side may take, in tokens; longer documents are run row by
            row.
    """

    steps: int = _STEPS
    lr: float | None = None
    n_probes: int | None = None
    probes_per_step: int = 4
    n_held_out: int | None = None
    probe_tokens: int = 40
    forward_weight: float = 0.6
    temperature: float = 0.5
    evaluate_every: int = 12
    patience: int = 2
    tolerance: float = 0.02
    min_fidelity: float | None = None
    max_steps: int = 192
    seed: int = 0
    max_entries: int = 8192

    def __post_init__(self) -> None:
        checks = {
            "steps": (self.steps >= 1, "at least 1"),
            "lr": (self.lr is None or 0 < self.lr < math.inf, "above 0, or None"),
            "n_probes": (
                self.n_probes is None or self.n_probes >= len(KINDS),
                f"at least {len(KINDS)}, one of every kind, or None",
            ),
            "probes_per_step": (self.probes_per_step >= 1, "at least 1"),
            "n_held_out": (self.n_held_out is None or self.n_held_out >= 1, "at least 1, or None"),
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
    def practised(self) -> int:
        """Number of training probes prepared for each document."""
        least = _LEAST_OF_FEW if self.steps < _FEW_STEPS else _LEAST_PROBES
        return max(least, self.steps // 2) if self.n_probes is None else self.n_probes

    @property
    def held_out(self) -> int:
        """Number of spans of either kind that are held out, for each document."""
        return (1 if self.steps < _FEW_STEPS else 2) if self.n_held_out is None else self.n_held_out

    @property
    def most_looks_without_gain(self) -> int:
        """Number of evaluations without a gain after which a round stops."""
        return max(1, self.steps // _STEPS) * self.patience

    @property
    def name(self) -> str:
        """Name for the fingerprint: the number of steps for people, and a digest of all that decides the result."""
        values = {**asdict(self), "n_probes": self.practised, "n_held_out": self.held_out, "recipe": RECIPE}
        del values["max_entries"]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return f"refine:{self.steps}:{digest[:12]}"

    @property
    def probes(self) -> ProbeSettings:
        """Settings of each document's probes."""
        return ProbeSettings(self.practised, self.held_out, self.probe_tokens, self.temperature, self.seed)

    @property
    def extra_tokens(self) -> int:
        """Most tokens that refinement runs behind a document."""
        return self.probes.room
