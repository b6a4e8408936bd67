"""What must be the same for a run to go on, and what is said where it is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kv_memory.datasets import Example
from kv_memory.errors import AdapterMismatchError, CheckpointError
from kv_memory.model.backbone import Backbone
from kv_memory.train.checkpoints import Checkpoint
from kv_memory.train.settings import TrainSettings

__all__ = ["check_resumable", "data_sha256", "identity"]

_NAMES = {"data_sha256": "the examples", "prompt": "the prompt form", "n_processes": "the number of processes"}


def data_sha256(examples: Sequence[Example]) -> str:
    """Hash of the list of examples: ids, lengths and number of questions, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id}:{len(example.context)}:{len(example.questions)}\n".encode())
    return digest.hexdigest()


def identity(
    settings: TrainSettings, backbone: Backbone, examples: Sequence[Example], *, n_processes: int
) -> dict[str, Any]:
    """What decides the result of a run, as JSON."""
    return {
        "settings": json.loads(json.dumps(asdict(settings))),  # as it comes back: tuples are lists
        "weights_sha256": backbone.weights_sha256,
        "data_sha256": data_sha256(examples),
        "prompt": backbone.prompt.digest,
        "n_processes": n_processes,
    }


def check_resumable(checkpoint: Checkpoint, now: Mapping[str, Any], *, model: str) -> None:
    """Raise unless a run that is like `now` can go on from a checkpoint.

    Args:
        checkpoint: Where it would go on.
        now: From `identity`.
        model: Its name, for the message.

    Raises:
        AdapterMismatchError: The checkpoint belongs to other weights.
        CheckpointError: Settings, data, prompt or processes differ; each is named.
    """
    then, where = checkpoint.state, str(checkpoint.folder)
    if then["weights_sha256"] != now["weights_sha256"]:
        raise AdapterMismatchError(
            f"the run was one of other weights ({then['weights_sha256'][:12]}) than {model} has "
            f"({now['weights_sha256'][:12]})",
            where=where,
            next_step="Name the model it was begun with (--model), or train in another folder.",
        )
    differences = [
        f"{name} was {then['settings'].get(name)!r} and is {now['settings'].get(name)!r}"
        for name in sorted({*then["settings"], *now["settings"]})
        if then["settings"].get(name) != now["settings"].get(name)
    ]
    differences += [f"{said} changed" for name, said in _NAMES.items() if then[name] != now[name]]
    if differences:
        raise CheckpointError(
            f"the run was begun otherwise: {'; '.join(differences)}",
            where=where,
            next_step="Resume with the options it was begun with, or begin another run in another folder, from this "
            "one's adapter (--init) if you like.",
        )
