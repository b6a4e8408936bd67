"""Checkpoints: folders that are written atomically, and what they record of a run.

A checkpoint is written under a temporary name, synced to disk, and renamed. It contains the parameters in full
precision and the optimiser's state as safetensors files, a usable adapter, and `checkpoint.json` with everything else.
It needs no random state: all randomness of a run is derived from its seed and the number of the step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kv_memory.datasets import Example
from kv_memory.errors import TrainingError
from kv_memory.model.backbone import Backbone
from kv_memory.train.settings import TrainSettings

CHECKPOINT_VERSION = 3
SHARD_BYTES = 15 * 2**20  # below 16 MiB, a common limit on file sizes
_NOTE = "checkpoint.json"

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """The state of a run after a step, and its parameters and optimiser state as tensors, by name.

    The state is JSON-serialisable: `RunState`, `identity`, `stage`, and `score`, the mean KL, None if not evaluated.
    """

    state: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


@dataclass(kw_only=True)
class RunState:
    """State that changes from step to step, besides parameters and optimiser; part of every checkpoint.

    Attributes:
        step: Number of steps done, over both stages.
        earlier_s: Seconds of the earlier parts of the run.
        pieces: Number of parts into which batches are split after the GPU ran out of memory; else 1.
        base_steps: Number of steps that the adapter was trained for before the run.
        kl: KL of the adapter when it was last evaluated; None before. For the others see `TrainReport`.
    """

    step: int = 0
    n_tokens: int = 0
    earlier_s: float = 0.0
    pieces: int = 1
    base_steps: int = 0
    kl: Mapping[float, float] | None = None
    baseline: Mapping[float, float] | None = None
    none: float | None = None
    _begin_s: float = field(default_factory=time.monotonic, init=False)

    @property
    def here_s(self) -> float:
        """Seconds since the start of this part of the run."""
        return time.monotonic() - self._begin_s

    @property
    def elapsed_s(self) -> float:
        """Seconds of all parts of the run."""
        return self.earlier_s + self.here_s

    def to_json(self) -> dict[str, Any]:
        """The state for a checkpoint; this part of the run is then one of the earlier ones."""
        state = {**asdict(self), "earlier_s": self.elapsed_s}
        del state["_begin_s"]
        return state

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> RunState:
        """Inverse of `to_json`; other names in `state` are ignored."""
        known = {known.name: state[known.name] for known in fields(cls) if known.init}
        return cls(**{**known, "kl": by_ratio(state["kl"]), "baseline": by_ratio(state["baseline"])})


def by_ratio(data: Mapping[str, float] | None) -> dict[float, float] | None:
    """A mapping by keep ratio from JSON, where keys are strings."""
    return None if data is None else {float(ratio): value for ratio, value in data.items()}


class Checkpoints:
    """The checkpoints of a run, in a folder created with the first: the newest `keep`, and the best by evaluation."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self._folder = folder
        self._keep = keep

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        names = [path.name.removeprefix("step-") for path in self._folder.glob("step-*")]
        return sorted(int(name) for name in names if name.isdigit())

    def folder(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self._folder / f"step-{step:08d}"

    def save(self, checkpoint: Checkpoint, *, write_adapter: Callable[[Path], None]) -> Path:
        """Write a checkpoint, then remove those that are no longer kept; the best has the lowest `score`.

        `write_adapter` writes the adapter into a given folder.

        Raises:
            TrainingError: The checkpoint cannot be written; earlier ones are untouched.
        """
        # A copy, because safetensors rejects tensors that share memory, such as views of one buffer.
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in checkpoint.tensors.items()}
        shards = split_torch_state_dict_into_shards(
            tensors, filename_pattern="state{suffix}.safetensors", max_shard_size=SHARD_BYTES
        )

        def write(folder: Path) -> None:
            (folder / "adapter").mkdir()
            for file, names in shards.filename_to_tensors.items():
                save_file({name: tensors[name] for name in names}, folder / file)
            write_adapter(folder / "adapter")
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            hashes = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
            note = {"version": CHECKPOINT_VERSION, **checkpoint.state, "files": hashes}
            (folder / _NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")

        final = self.folder(checkpoint.state["step"])
        try:
            replace_folder(final, write)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"the checkpoint cannot be written: {error}",
                where=str(final),
                next_step="Free disk space, then continue with --resume.",
            ) from error
        self._rotate()
        return final

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint, its tensors on the CPU; None if there are no checkpoints.

        Raises:
            TrainingError: All existing checkpoints are damaged, or have another format.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._load(step)
            except (OSError, ValueError, LookupError, AttributeError, SafetensorError) as error:
                logger.warning("skipped an unusable checkpoint: %s: %s", self.folder(step), error)
        if steps:
            raise TrainingError(
                f"all checkpoints are damaged, or not of version {CHECKPOINT_VERSION}",
                where=str(self._folder),
                next_step="Use the version of kv-memory that made them, or start again in another folder.",
            )
        return None

    def best(self) -> int | None:
        """The step with the lowest score, the latest of equal ones; None if no checkpoint was evaluated."""
        scores = {step: self.state(step).get("score") for step in self.steps()}
        known = [(score, -step) for step, score in scores.items() if score is not None]
        return -min(known)[1] if known else None

    def state(self, step: int) -> dict[str, Any]:
        """Contents of the `checkpoint.json` of a step; empty if it cannot be read."""
        try:
            state = json.loads((self.folder(step) / _NOTE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _load(self, step: int) -> Checkpoint:
        folder, state = self.folder(step), self.state(step)
        if (state.get("version"), state.get("step")) != (CHECKPOINT_VERSION, step):
            raise ValueError(f"{_NOTE} is damaged, or not of version {CHECKPOINT_VERSION}")
        tensors: dict[str, torch.Tensor] = {}
        for name, sha256 in state["files"].items():
            if _sha256(folder / name) != sha256:
                raise ValueError(f"{name} does not match its recorded hash")
            if name.startswith("state"):
                tensors |= load_file(folder / name)
        return Checkpoint(state=state, tensors=tensors)

    def _rotate(self) -> None:
        steps = self.steps()
        wanted = {*steps[-self._keep :], self.best()}
        for step in steps:
            if step not in wanted:
                # Renamed first: a half-deleted checkpoint must not look like a complete one.
                shutil.rmtree(self.folder(step).rename(self._folder / f".gone-{step}"), ignore_errors=True)


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill an empty folder, sync it to disk, then rename it; an existing folder is replaced as a whole."""
    scratch, old = folder.with_name(f".writing-{folder.name}"), folder.with_name(f".old-{folder.name}")
    for path in (scratch, old):
        shutil.rmtree(path, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        write(scratch)
        for path in [*scratch.rglob("*"), scratch]:
            _fsync(path)
        if folder.is_dir():
            os.replace(folder, old)
        os.replace(scratch, folder)
        _fsync(folder.parent)
    finally:
        for path in (scratch, old):
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def identity(
    settings: TrainSettings, backbone: Backbone, examples: Sequence[Example], n_processes: int
) -> dict[str, Any]:
    """Everything that determines the result of a run, JSON-serialisable."""
    data = hashlib.sha256()
    for example in examples:
        data.update(f"{example.id}:{len(example.context)}:{len(example.questions)}\n".encode())
    return {
        "settings": json.loads(json.dumps(asdict(settings))),  # as read back from JSON: tuples become lists
        "weights_sha256": backbone.weights_sha256,
        "data_sha256": data.hexdigest(),
        "prompt": backbone.prompt.digest,
        "n_processes": n_processes,
    }


_NAMES = {
    "weights_sha256": "the model's weights",
    "data_sha256": "the examples",
    "prompt": "the prompt form",
    "n_processes": "the number of processes",
}


def check_resumable(then: Mapping[str, Any], now: Mapping[str, Any], *, where: Path) -> None:
    """Raise a TrainingError unless a run of the identity `now` can resume from the checkpoint with the state `then`.

    It names each difference in settings, data, model, prompt form or number of processes.
    """
    differences = [
        f"{name} was {was!r} and is {value!r}"
        for name, value in now["settings"].items()
        if (was := then["settings"].get(name)) != value
    ]
    differences += [f"{said} changed" for name, said in _NAMES.items() if then[name] != now[name]]
    if differences:
        raise TrainingError(
            f"the run was started with other settings or data: {'; '.join(differences)}",
            where=str(where),
            next_step="Resume with the model and options the run was started with, or start a new run in another "
            "folder, optionally from this run's adapter (--init).",
        )
