"""What the options of `kv-memory train` become: the settings of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kv_memory.errors import ConfigError

if TYPE_CHECKING:
    from kv_memory.train import TrainSettings

__all__ = ["changes_of", "settings_of"]


def changes_of(options: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Settings asked for by name: options that were given, and `--set NAME=VALUE`.

    Args:
        options: By the names of `TrainSettings`; None where an option was not given.
        assignments: `NAME=VALUE`; lists with commas, `none` for what has no value.

    Raises:
        ConfigError: There is no such setting, or the value is of another type.
    """
    changes = {name: value for name, value in options.items() if value is not None}
    for text in assignments:
        name, found, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not found:
            raise ConfigError(f"--set must be NAME=VALUE, got {text!r}", where="--set", next_step="E.g. --set eta=8")
        changes[name] = _typed(name, value.strip())
    return changes


def settings_of(preset_name: str, changes: Mapping[str, Any]) -> TrainSettings:
    """The settings of a preset with changes.

    Raises:
        ConfigError: As `preset`.
    """
    from kv_memory.train import preset

    return preset(preset_name, **changes)


def _typed(name: str, value: str) -> Any:
    from kv_memory.train import TrainSettings

    fields = {field.name: str(field.type) for field in dataclasses.fields(TrainSettings)}
    if name not in fields:
        raise ConfigError(f"there is no setting {name!r}", where="--set", next_step=f"There are {', '.join(fields)}.")
    kind = fields[name]  # as written in the class, where annotations stay text
    if value.lower() == "none" and "None" in kind:
        return None
    try:
        if kind.startswith("tuple"):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        if kind.startswith("int"):
            return int(value)
        return float(value) if kind.startswith("float") else value
    except ValueError:
        wanted = "a whole number" if kind.startswith("int") else "a number"
        raise ConfigError(f"{name} must be {wanted}, got {value!r}", where="--set") from None
