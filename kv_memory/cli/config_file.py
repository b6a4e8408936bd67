"""Settings of a command that has many: from a file (`--config`), from `--set NAME=VALUE`, and from its own options."""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer

from kv_memory.cli.options import entries_of, pairs_of
from kv_memory.cli.output import Output
from kv_memory.config import check_names
from kv_memory.errors import ConfigError


class Setting(NamedTuple):
    """A value that may be given: an argument of `owner`, a dataclass or function, and its line in the docstring."""

    owner: Callable[..., Any]
    kind: Any
    default: Any
    meaning: str


def settings_of(*owners: Callable[..., Any], without: Collection[str] = ()) -> dict[str, Setting]:
    """The arguments of dataclasses and functions as settings, by name, except those in `without`; the last one wins."""
    found = {}
    for owner in owners:
        kinds = get_type_hints(owner)
        entries = entries_of(owner, "Attributes" if isinstance(owner, type) else "Args")
        for name, parameter in inspect.signature(owner).parameters.items():
            if name not in without:
                found[name] = Setting(owner, kinds[name], parameter.default, entries.get(name, ("", ""))[1])
    return found


@dataclass(frozen=True)
class Given:
    """Settings that the user gave.

    Attributes:
        config (FILE): TOML or JSON file of settings, by the names that --list-settings prints.
        set_ (NAME=VALUE): Any setting that --list-settings prints; repeatable. A list is a,b; a share may be 1/8. Takes
            precedence over the other options, and these over the file.
    """

    config: Path | None = None
    set_: list[str] | None = None

    def gather(self, known: Mapping[str, Setting], **options: Any) -> dict[Callable[..., Any], dict[str, Any]]:
        """The settings by owner and name, with values of the right types.

        Args:
            known: All settings of the command, from `settings_of`.
            options: Values of the command's options, by the name of the setting; None or [] if an option was not given.

        Raises:
            ConfigError: The file cannot be read, a name is unknown, or a value has the wrong type.
        """
        given = [(name, value, str(self.config)) for name, value in (_load(self.config) if self.config else {}).items()]
        given += [(name, value, name) for name, value in options.items() if value is not None and value != []]
        given += [(name, value, "--set") for name, value in pairs_of(self.set_ or (), option="--set")]
        found: dict[Callable[..., Any], dict[str, Any]] = {setting.owner: {} for setting in known.values()}
        for given_name, value, where in given:
            name = given_name.strip().replace("-", "_")
            check_names([name], known, what="setting", where=where, every="--list-settings prints all settings.")
            try:
                found[known[name].owner][name] = _convert(value, known[name].kind)
            except ValueError as error:
                raise ConfigError(f"{name} must be {error}, got {value!r}", where=where) from None
        return found


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


_WANTED = {bool: "true or false", int: "a whole number", float: "a number or a fraction"}
_PARSERS: dict[Any, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    float: lambda text: float(Fraction(text)),
}


def _convert(value: Any, kind: Any) -> Any:
    """The value in its type; a ValueError says which type that is."""
    arguments = get_args(kind)
    if get_origin(kind) in {Union, UnionType}:
        if NoneType in arguments and (value is None or str(value).lower() == "none"):
            return None
        return _convert(value, arguments[0])
    if get_origin(kind) in {tuple, Sequence}:
        items = value if isinstance(value, list | tuple) else filter(None, map(str.strip, str(value).split(",")))
        return tuple(_convert(item, arguments[0]) for item in items)
    if value is None or isinstance(value, list | tuple | dict):
        raise ValueError("one value")
    text = str(value).strip()  # a number of a file, too: 1 is as good as 1.0, and True is not 1
    if get_origin(kind) is Literal:
        if text not in arguments:
            raise ValueError(f"one of {', '.join(arguments)}")
        return text
    try:
        return _PARSERS.get(kind, kind)(text)
    except (ValueError, KeyError, ArithmeticError):
        raise ValueError(_WANTED[kind]) from None


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
