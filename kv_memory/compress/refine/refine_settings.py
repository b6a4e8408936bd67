"""How caches are refined."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from kv_memory.compress.refine.probes import KINDS, probe_room
from kv_memory.errors import ConfigError

__all__ = ["RefineSettings"]

RECIPE = 3  # raised when the same settings give another result; part of the fingerprint
_STEPS = 48
_FEW_STEPS = 24  # below, making probes and looking at them would cost more than the steps
_LEAST_PROBES, _LEAST_OF_FEW = 24, 8


@dataclass(frozen=True, kw_only=True)
class RefineSettings:
    """How caches are refined. All of it but the memory limit decides the result, and is part of the fingerprint.

    Attributes:
        steps: Gradient steps, at most; fewer where held-out probes no longer gain.
        lr: Of Adam, in standard deviations of each layer's keys and values; falls linearly to 0. None: 0.01 where an
            eighth of the entries is kept and in inverse proportion elsewhere, in 0.005 to 0.05: the fewer there are,
            the further each is from where it should be.
        n_probes: Prepared for each document, to practise; see `make_probes`. None: half as many as steps, so that each
            comes about eight times however many steps there are, but at least 24, or 8 where there are fewer steps than
            24.
        probes_per_step: Of these, asked in one step, of every kind.
        n_held_out: Spans of either kind that are never practised and decide what is kept, with three times as many
            questions and statements. None: 2, or 1 where there are fewer steps than 24.
        probe_tokens: The longest span or statement.
        forward_weight: λ of the loss, see `distillation_loss`.
        temperature: At which the model's questions and statements are sampled.
        evaluate_every: Steps between looks at the held-out probes.
        patience: Looks without a gain after which to stop, in 48 steps; in proportion more of them where there are more
            steps, as the rate falls more slowly, and with it what held-out probes go up and down.
        tolerance: How much worse than the start the result may be on any kind of held-out probe, as a share.
        min_fidelity: Go on, in further rounds of `steps` with half the `lr`, until the held-out KL in nats is at most
            this; None for one round.
        max_steps: Where to give up on that.
        seed: Of all chance.
        max_entries: Cache entries that rows side by side may take, in tokens; what is longer is read row by row.
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
        """How many probes are prepared to practise, for each document."""
        least = _LEAST_OF_FEW if self.steps < _FEW_STEPS else _LEAST_PROBES
        return max(least, self.steps // 2) if self.n_probes is None else self.n_probes

    @property
    def held_out(self) -> int:
        """How many spans of either kind are held out, for each document."""
        return (1 if self.steps < _FEW_STEPS else 2) if self.n_held_out is None else self.n_held_out

    @property
    def most_looks_without_gain(self) -> int:
        """After how many it stops."""
        return max(1, self.steps // _STEPS) * self.patience

    @property
    def name(self) -> str:
        """For the fingerprint: the steps for people, and a digest of all that decides the result."""
        values = {**asdict(self), "n_probes": self.practised, "n_held_out": self.held_out, "recipe": RECIPE}
        del values["max_entries"]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return f"refine:{self.steps}:{digest[:12]}"

    @property
    def extra_tokens(self) -> int:
        """How many tokens refinement puts behind a document, at most."""
        return probe_room(self.probe_tokens)
