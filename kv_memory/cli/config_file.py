"""Settings of a command that has many: from a file (`--config`), from `--set NAME=VALUE`, and from its own options."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from kv_memory.cli.output import Output
from kv_memory.errors import ConfigError

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="TOML or JSON file of settings, by the names that --list-settings prints."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any setting that --list-settings prints; repeatable. A list is a,b; a share may be 1/8. Takes precedence "
        "over the other options, and these over the file.",
    ),
]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A value that a file, `--set` or an option may give.

    Attributes:
        owner: Dataclass with a field of this name.
        kind: Type of the value.
        default: Default value.
        meaning: Line of the field in the docstring of its dataclass.
    """

    owner: type
    kind: Any
    default: Any
    meaning: str


def settings_of(*owners: type, without: Collection[str] = ()) -> dict[str, Setting]:
    """The fields of dataclasses as settings, by name, except those in `without`."""
    found = {}
    for owner in owners:
        kinds, meanings = get_type_hints(owner), _meanings(owner)
        for field in dataclasses.fields(owner):
            if field.name not in without:
                meaning = meanings.get(field.name, "")
                found[field.name] = Setting(owner, kinds[field.name], field.default, meaning)
    return found


def _meanings(owner: type) -> dict[str, str]:
    """The texts of a docstring's `Attributes`, by name."""
    found: dict[str, str] = {}
    name = ""
    for line in (inspect.getdoc(owner) or "").partition("Attributes:\n")[2].splitlines():
        if begun := re.match(r" {4}(\w+): (.*)", line):
            name = begun[1]
            found[name] = begun[2]
        elif line.startswith(" " * 8):
            found[name] += f" {line.strip()}"
        else:  # the end of the section
            break
    return found


def gather_settings(
    known: Mapping[str, Setting], *, config: Path | None, assignments: Sequence[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings that the user gave, by name, with values of the right types.

    Args:
        known: All settings of the command, from `settings_of`.
        config: File of settings.
        assignments: Strings `NAME=VALUE`.
        options: Values of the command's options, by the name of the setting; None if an option was not given.

    Raises:
        ConfigError: The file cannot be read, a name is unknown, or a value has the wrong type.
    """
    found: dict[str, Any] = {}
    for name, value in _load(config).items() if config is not None else ():
        found |= _checked(known, name, value, where=str(config))
    for name, value in options.items():
        if value is not None:
            found |= _checked(known, name, value, where=name)
    for text in assignments:
        name, found_sign, value = text.partition("=")
        if not found_sign:
            raise ConfigError(f"--set must be NAME=VALUE, got {text!r}", where="--set", next_step="E.g. --set seed=1")
        found |= _checked(known, name, value, where="--set")
    return found


def of_owner(owner: type, known: Mapping[str, Setting], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the settings that belong to one dataclass."""
    return {name: value for name, value in values.items() if known[name].owner is owner}


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is not an object of names and values")
    except (OSError, ValueError) as error:  # syntax errors of both formats are ValueErrors
        raise ConfigError(
            f"the settings cannot be read: {error}",
            where=str(path),
            next_step="Pass a TOML file with lines like seed = 1, or a .json file with one object.",
        ) from error
    return found


def _checked(known: Mapping[str, Setting], given: str, value: Any, *, where: str) -> dict[str, Any]:
    name = given.strip().replace("-", "_")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"Did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"unknown setting {given.strip()!r}", where=where, next_step=f"{meant}--list-settings prints all settings."
        )
    try:
        return {name: _convert(value, known[name].kind)}
    except ValueError as error:
        raise ConfigError(f"{name} must be {error}, got {value!r}", where=where) from None


def _convert(value: Any, kind: Any) -> Any:
    """The value in its type; a ValueError says which type that is."""
    arguments = get_args(kind)
    if NoneType in arguments:
        if value is None or str(value).lower() == "none":
            return None
        return _convert(value, next(argument for argument in arguments if argument is not NoneType))
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else filter(None, map(str.strip, str(value).split(",")))
        return tuple(_convert(item, arguments[0]) for item in items)
    if value is None or isinstance(value, list | tuple | dict):
        raise ValueError("one value")
    text = str(value).strip()  # a number of a file, too: 1 is as good as 1.0, and True is not 1
    if get_origin(kind) is Literal:
        if text not in arguments:
            raise ValueError(f"one of {', '.join(arguments)}")
        return text
    if kind is bool:
        if text.lower() not in {"true", "false"}:
            raise ValueError("true or false")
        return text.lower() == "true"
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise ValueError("a whole number") from None
    return _number(text) if kind is float else kind(text)


def _number(text: str) -> float:
    above, slash, below = text.partition("/")
    try:
        number = float(above) / float(below) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("a number or a fraction")
    return number


def list_settings_option(load: Callable[[], Mapping[str, Setting]]) -> Any:
    """The option `--list-settings`, which prints the settings that `load` returns, and ends the command."""

    def show(wanted: bool) -> None:
        if wanted:
            rows = []
            for name, known in load().items():
                choices = _choices(known.kind)
                one_of = f" One of {', '.join(choices)}." if choices else ""
                rows.append((name, _shown(known.default), known.meaning + one_of))
            Output(as_json=False).table(("setting", "default", "meaning"), rows)
            raise typer.Exit

    return typer.Option("--list-settings", callback=show, is_eager=True, help="Print all settings, and exit.")


def _choices(kind: Any) -> list[str]:
    """The names that a value, or an item of it, is chosen from; empty if it is not a name from a list."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [name for argument in get_args(kind) for name in _choices(argument)]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    return str(value).lower() if value is None or isinstance(value, bool) else f"{value}"
