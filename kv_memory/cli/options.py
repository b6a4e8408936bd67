"""Commands: their options, whose help is in docstrings, and the options that several commands share."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from kv_memory.cli.output import Output, reporting
from kv_memory.errors import ConfigError
from kv_memory.settings import OF_SMOLLM2, WRITTEN, MemorySettings

if TYPE_CHECKING:
    from kv_memory.memory import KVMemory
    from kv_memory.store import Store

DEFAULT_STORE = Path("kv-memory-store")
DEFAULT_COLLECTION = "default"

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="KV_MEMORY_STORE", metavar="FOLDER", help="The store's folder.")
]
CollectionOption = Annotated[str, typer.Option("--collection", metavar="NAME", help="Collection in the store.")]
EncodingOption = Annotated[
    str, typer.Option("--encoding", metavar="NAME", help="Encoding of text files without a byte order mark.")
]
_MAY_BE_BLANK = {"chat_options", "stop"}  # no switches; and a line break ends an answer

Changes = dict[str, Any]  # settings that were given, for `MemorySettings.resolve`


@dataclass(frozen=True)
class Place:
    """Folder of the store, and collection in it; opened with a status line, since that takes a moment."""

    store: StoreOption = DEFAULT_STORE
    collection: CollectionOption = DEFAULT_COLLECTION

    def open_store(self, out: Output) -> Store:
        """Open an existing store for commands that need no model. Errors as in `Store.open`.

        A KVMemory would load the model library, which takes seconds.
        """
        with out.working("Starting"):
            from kv_memory.store import Store

            return Store.open(self.store, collection=self.collection, create=False)

    def open_memory(self, out: Output, *, create: bool = False, **changes: Any) -> KVMemory:
        """Open a memory with its model, or with `create` also a new one; changes and errors as in `KVMemory.open`."""
        if not create:
            # Opened once without the model library, which takes seconds: a missing store or collection is said at once.
            self.open_store(out).close()
        with out.working("Loading the model"):
            from kv_memory.memory import KVMemory

            return KVMemory.open(self.store, collection=self.collection, create=create, **changes)


def command(*settings: str, json_lines: str = "") -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Make a command of a function: what it raises is printed and becomes an exit code, see `reporting`.

    The function prints for people, and returns what `--json` prints instead. Its section `Options` has a line
    `name (METAVAR): Help.` for each parameter; keyword-only ones become options, others arguments. A parameter that is
    a dataclass stands for options of its fields, with help from its `Attributes`; `changes` stands for options of
    settings, and is those that were given; `out`, the command's `Output`, stands for `--json`.

    Args:
        settings: Fields of `MemorySettings` with an option; none means all. Their values are parsed by
            `MemorySettings.resolve`, so that its errors are reported as those of the command.
        json_lines: Objects of which `--json` prints one a line, for its help; empty if it prints a single object.
    """
    json_help = f"Print one JSON object per line: {json_lines}" if json_lines else "Print one JSON object"
    json_option = typer.Option("--json", help=f"{json_help}; errors as {{'error': ...}} with exit code 1 or 2.")
    as_json = _parameter("as_json", Annotated[bool, json_option], False)
    of_settings = [_of_setting(name) for name in settings or _SETTINGS]

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        signature, helps = inspect.signature(function, eval_str=True), entries_of(function, "Options")
        parameters: list[inspect.Parameter] = []
        groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
        for name, parameter in signature.parameters.items():
            if name == "changes" or is_dataclass(parameter.annotation):
                made = of_settings if name == "changes" else _fields_of(parameter.annotation)
                make = _changes if name == "changes" else parameter.annotation
                groups[name] = make, [each.name for each in made]
                parameters += made
            else:
                parameters.append(as_json if name == "out" else _described(parameter, helps))

        @functools.wraps(function)
        def run(**values: Any) -> None:
            with reporting(as_json=values.pop("as_json"), by_line=bool(json_lines)) as out:
                values |= {each.name: _value(each, values[each.name]) for each in parameters if each is not as_json}
                for name, (make, names) in groups.items():
                    values[name] = make(**{each: values.pop(each) for each in names})
                out.result(function(**values, out=out))

        # typer takes the options from here.
        typed = [_as_typed(parameter) for parameter in parameters]
        run.__signature__ = signature.replace(parameters=typed)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in typed}
        run.__doc__ = (inspect.getdoc(function) or "").partition("\n\nOptions:\n")[0]
        return run

    return decorate


def entries_of(documented: object, section: str) -> dict[str, tuple[str | None, str]]:
    """The entries of a docstring's section, e.g. `Attributes`, by name: the metavar in parentheses, and the text."""
    found: dict[str, tuple[str | None, str]] = {}
    text = (inspect.getdoc(documented) or "").partition(f"{section}:\n")[2]
    for line in re.sub(r"`(\S+)`", r"\1", text).splitlines():
        if begun := re.match(r" {4}(\w+)(?: \(([^)]+)\))?: (.*)", line):
            name, metavar, text = begun.groups()
        elif line.startswith(" " * 8):
            text += f" {line.strip()}"
        else:  # the end of the section
            break
        found[name] = metavar, text
    return found


def pairs_of(items: Iterable[str], *, option: str) -> list[tuple[str, str]]:
    """The names and values of an option's items `NAME=VALUE`.

    Raises:
        ConfigError: An item has no name or no equals sign.
    """
    pairs = []
    for item in items:
        name, found, value = item.partition("=")
        if not found or not name.strip():
            raise ConfigError(f"{option} must be NAME=VALUE, got {item!r}", where=option, next_step="E.g. year=2026")
        pairs.append((name.strip(), value))
    return pairs


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _described(parameter: inspect.Parameter, helps: dict[str, tuple[str | None, str]]) -> inspect.Parameter:
    """The parameter as an option or argument, if it is among the helps; another one is its own option."""
    if parameter.name not in helps:
        return parameter
    metavar, text = helps[parameter.name]
    made = typer.Argument(metavar=metavar, help=text)
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
        made = typer.Option(f"--{parameter.name.strip('_').replace('_', '-')}", metavar=metavar, help=text)
    return parameter.replace(annotation=Annotated[parameter.annotation, made])


# Paths are typed as texts: of an empty one, click would make the path of the current folder.
_TYPED: dict[Any, Any] = {
    **{Path: str, Path | None: str | None},
    **{list[Path]: list[str], list[Path] | None: list[str] | None},
}


def _as_typed(parameter: inspect.Parameter) -> inspect.Parameter:
    kind, option = get_args(parameter.annotation)
    return parameter.replace(annotation=Annotated[_TYPED.get(kind, kind), option])


def _value(parameter: inspect.Parameter, given: Any) -> Any:
    """The value of a parameter from what was typed; a ConfigError if that is blank."""
    kind, option = get_args(parameter.annotation)
    texts = [text for text in (given if isinstance(given, list) else [given]) if isinstance(text, str)]
    if parameter.name not in _MAY_BE_BLANK and not all(text.strip() for text in texts):
        name = option.metavar
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            name = f"--{parameter.name.strip('_').replace('_', '-')}"
        raise ConfigError(f"{name} is empty", where=name, next_step="Pass a value, or see --help.")
    if kind not in _TYPED or given is None:
        return given
    return [Path(text) for text in given] if isinstance(given, list) else Path(given)


def _fields_of(record: type) -> list[inspect.Parameter]:
    hints, helps = get_type_hints(record, include_extras=True), entries_of(record, "Attributes")
    return [_described(_parameter(each.name, hints[each.name], each.default), helps) for each in fields(record)]


_SETTINGS = [each.name for each in fields(MemorySettings) if each.name not in {"layout", "order", "rank_bias"}]
_METAVARS = {"adapter": "FOLDER", "keep_ratio": "SHARE", "max_bytes": "SIZE", "refine_steps": "STEPS"}
_METAVARS |= {"min_fidelity": "KL", "keep_tokens": "N", "passage_tokens": "N"}
_NAMES = {"refine_steps": "--refine", "keep_text": "--keep-text/--no-keep-text"}


def _of_setting(name: str) -> inspect.Parameter:
    """The option of a setting; None if it is not given."""
    hint, default = get_type_hints(MemorySettings)[name], getattr(MemorySettings, name)
    kind: Any = next((kind for kind in (bool, int, float) if kind is hint or kind in get_args(hint)), str)
    new = f"{OF_SMOLLM2[name]} for smollm2, {default or 'none'} for others" if name in OF_SMOLLM2 else default
    help_ = entries_of(MemorySettings, "Attributes")[name][1]
    help_ += f"  [default: the store's{'' if new is None else f'; in a new store {new}'}]"
    metavar = None if kind is bool else _METAVARS.get(name, "NAME")
    option = typer.Option(_NAMES.get(name, f"--{name.replace('_', '-')}"), metavar=metavar, help=help_)
    return _parameter(name, Annotated[(str if name in WRITTEN else kind) | None, option], None)


def _changes(**given: Any) -> Changes:
    changes = {name: value for name, value in given.items() if value is not None}
    MemorySettings.resolve({}, **changes)  # a typo should fail before the store is opened
    return changes
