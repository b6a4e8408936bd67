"""Estimates of the cost of a run, measured with a few steps without updates."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

import torch

from kv_memory.errors import ConfigError
from kv_memory.train.adapters import Stage, parameters_of, trainable
from kv_memory.train.gradients import Gradients

_WARMUP_SHARE = 0.15  # largest share of the warm-up when steps are fitted to a time limit
_USABLE = 0.94  # share of the time limit for steps; the rest allows for checkpoints and for longer steps than measured


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated cost of a run, from a few steps.

    Attributes:
        warmup_step_s: Seconds per step of stage (a); 0 without this stage.
        step_s: Seconds per step of stage (b); 0 without this stage.
        total_s: Seconds for both stages, without evaluation.
        tokens_per_s: Tokens processed per second; the passes of teacher and student count once.
        peak_memory_bytes: Peak memory in bytes, of the GPU if there is one, else of the process.
        n_parameters: Number of trained parameters, in scorer and LoRA.
        adapter_bytes: Size of the saved adapter in bytes.
        checkpoint_bytes: Size of one checkpoint in bytes, without the adapter in it.
        pieces: Number of parts into which a batch had to be split to fit into memory.
        questions_s: Seconds for writing questions about a corpus, before the first step.
    """

    warmup_step_s: float
    step_s: float
    warmup_steps: int
    steps: int
    total_s: float
    tokens_per_s: float
    peak_memory_bytes: int
    n_parameters: int
    adapter_bytes: int
    checkpoint_bytes: int
    pieces: int
    questions_s: float = 0.0


def measure(gradients: Gradients, *, n_steps: int = 3) -> Estimate:
    """Time the gradients of `n_steps` of each stage, after one more; the adapter's LoRA is float32 afterwards."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    adapter, settings = gradients.adapter, gradients.settings
    lengths: dict[Stage, int] = {"warmup": settings.warmup_steps, "distillation": settings.steps}
    seconds: dict[Stage, float] = dict.fromkeys(lengths, 0.0)
    tokens_per_s = 0.0
    for stage, length in lengths.items():
        if length:
            seconds[stage], tokens_per_s = _time(gradients, stage, n_steps)
    everything = parameters_of(adapter)
    n_lora = sum(p.numel() for name, p in everything.items() if name.startswith("lora."))
    n_parameters = sum(p.numel() for p in everything.values())
    n_moving = sum(p.numel() for p in trainable(adapter, settings, "distillation").values())
    return Estimate(
        warmup_step_s=seconds["warmup"],
        step_s=seconds["distillation"],
        warmup_steps=settings.warmup_steps,
        steps=settings.steps,
        total_s=sum(lengths[stage] * seconds[stage] for stage in lengths),
        tokens_per_s=tokens_per_s,
        peak_memory_bytes=peak_memory_bytes(),
        n_parameters=n_parameters,
        adapter_bytes=n_lora * adapter.backbone.dtype.itemsize + (n_parameters - n_lora) * 4,
        checkpoint_bytes=4 * (n_parameters + 2 * n_moving),
        pieces=gradients.pieces,
    )


def _time(gradients: Gradients, stage: Stage, n_steps: int) -> tuple[float, float]:
    """Seconds per step, and tokens per second."""
    parameters = list(trainable(gradients.adapter, gradients.settings, stage).values())
    begin_s, n_tokens = 0.0, 0.0
    for step in range(n_steps + 1):
        tokens = gradients.compute(step, stage, parameters)["n_tokens"]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if step == 0:  # the first step includes one-time costs: prefix, memory, compiled kernels
            begin_s = time.perf_counter()
        else:
            n_tokens += tokens
    elapsed_s = time.perf_counter() - begin_s
    for parameter in parameters:
        parameter.grad = None
    return elapsed_s / n_steps, n_tokens / max(elapsed_s, 1e-9)


def fit_steps(estimate: Estimate, *, time_limit_s: float, evaluation_s: float = 0.0, eval_every: int = 0) -> Estimate:
    """The estimate for numbers of steps that fit a time limit, with a warm-up of at most 15 % of the time.

    Its `warmup_steps` are an upper limit. The time limit is for the whole run, with an evaluation every `eval_every`
    steps; 0 for no evaluation.

    Raises:
        ConfigError: The time is too short for a single step of stage (b).
    """
    left_s = max(0.0, time_limit_s * _USABLE - 2 * evaluation_s)
    warmup_steps = min(estimate.warmup_steps, int(left_s * _WARMUP_SHARE / max(estimate.warmup_step_s, 1e-9)))
    warmup_s = warmup_steps * estimate.warmup_step_s
    steps = int((left_s - warmup_s) / (estimate.step_s + (evaluation_s / eval_every if eval_every else 0.0)))
    if steps < 1:
        raise ConfigError(
            f"a time limit of {time_limit_s:.0f} s leaves no time for a step, which takes {estimate.step_s:.1f} s",
            where="time_limit_s",
            next_step="Raise the time limit, or lower max_tokens.",
        )
    total_s = warmup_s + steps * estimate.step_s
    return replace(estimate, warmup_steps=warmup_steps, steps=steps, total_s=total_s)


def peak_memory_bytes() -> int:
    """Peak memory so far in bytes: of the GPU if there is one, else of this process; 0 if unknown (Windows)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
