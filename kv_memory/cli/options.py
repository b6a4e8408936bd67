"""Commands: the options that several of them share, some made from the fields of `MemorySettings`, and their errors."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import typer

from kv_memory.cli.output import Output, reporting
from kv_memory.config import DecodeSettings
from kv_memory.settings import MemorySettings, new_value_text

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
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="A built-in model, a model folder, or a Hugging Face hub id.  [default: qwen-0.5b, or smollm2 if only "
        "that is prepared]",
    ),
]

Changes = dict[str, Any]  # settings that were given, for `MemorySettings.resolve`


class Place(NamedTuple):
    """Folder of the store, and collection in it; opened with a status line, since that takes a moment."""

    store: Path
    collection: str

    def open_store(self, out: Output) -> Store:
        """Open an existing store for commands that need no model. Errors as in `Store.open`.

        A KVMemory would load the model library, which takes seconds.
        """
        with out.working("Starting"):
            from kv_memory.store import Store

            return Store.open(self.store, collection=self.collection, create=False)

    def open_memory(self, out: Output, *, create: bool = False, **changes: Any) -> KVMemory:
        """Open a memory with its model, or with `create` also a new one; changes and errors as in `KVMemory.open`."""
        with out.working("Loading the model"):
            from kv_memory.memory import KVMemory

            return KVMemory.open(self.store, collection=self.collection, create=create, **changes)


class Asking(NamedTuple):
    """How questions are answered: arguments of `KVMemory.ask` by their names."""

    top_k: int | None
    settings: DecodeSettings
    read_from: Literal["caches", "text"]


def command(
    *settings: str, json_help: str = "Print one JSON object; errors as {'error': ...} with exit code 1 or 2."
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function: what it raises is printed and becomes an exit code, see `reporting`.

    Four parameters of the function stand for options that commands share: `out`, its `Output`, for `--json`; `place`
    for `--store` and `--collection`; `asking` for those of answers; `changes` for the settings that were given.

    Args:
        settings: Fields of `MemorySettings` with an option; none means all that have one. Their values are parsed by
            `MemorySettings.resolve`, so that its errors are reported as those of the command.
        json_help: Help of `--json`.
    """
    fields = [f for f in dataclasses.fields(MemorySettings) if f.metadata and (not settings or f.name in settings)]
    as_json = Annotated[bool, typer.Option("--json", help=json_help)]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        shared = {
            "out": [_option("as_json", as_json, False)],
            "place": _PLACE,
            "asking": _ASKING,
            "changes": [_setting_option(field) for field in fields],
        }

        @functools.wraps(function)
        def run(**values: Any) -> None:
            with reporting(as_json=values.pop("as_json")) as out:
                for name, options in shared.items():
                    if name in signature.parameters and name != "out":
                        values[name] = _VALUES[name]({option.name: values.pop(option.name) for option in options})
                function(**values, out=out)

        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            parameters += shared.get(parameter.name, [parameter])
        # typer takes the options from here.
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _setting_option(field: dataclasses.Field[Any]) -> inspect.Parameter:
    """The option of a setting; None if it is not given."""
    hint = get_type_hints(MemorySettings)[field.name]
    plain = [kind for kind in (bool, int, float) if kind is hint or kind in get_args(hint)]
    kind: Any = str if field.metadata["parse"] is not None or not plain else plain[0]
    new = new_value_text(field.name)
    help_ = field.metadata["help"] + (f"  [default: the store's; in a new store {new}]" if new else "")
    name = field.metadata["option"] or "--" + field.name.replace("_", "-")
    option = typer.Option(name, metavar=field.metadata["metavar"] or None, help=help_)
    return _option(field.name, Annotated[kind | None, option], None)


_PLACE = [_option("store", StoreOption, DEFAULT_STORE), _option("collection", CollectionOption, DEFAULT_COLLECTION)]
_ASKING = [
    _option(name, Annotated[kind, typer.Option(f"--{name.replace('_', '-')}", metavar=metavar, help=text)], default)
    for name, kind, default, metavar, text in (
        (
            "top_k",
            int | None,
            None,
            "N",
            "Maximum number of passages to answer from.  [default: 1 for smollm2, 3 for others]",
        ),
        ("max_new_tokens", int, 128, "N", "Maximum length of an answer in tokens."),
        ("temperature", float, 0.0, "T", "0 decodes greedily; above 0 samples."),
        ("seed", int | None, None, "N", "Seed for repeatable sampling.  [default: random]"),
        ("stop", list[str] | None, None, "STRING", "String that ends the answer, not included in it; repeatable."),
        (
            "text",
            bool,
            False,
            None,
            "Put the text of the passages into the prompt, as plain RAG does, to compare; needs documents added with "
            "--keep-text.",
        ),
    )
]


def _asking(given: dict[str, Any]) -> Asking:
    top_k, text, stop = given.pop("top_k"), given.pop("text"), given.pop("stop")
    return Asking(top_k, DecodeSettings(**given, stop=tuple(stop or ())), "text" if text else "caches")


def _changes(given: dict[str, Any]) -> Changes:
    changes = {name: value for name, value in given.items() if value is not None}
    MemorySettings.resolve({}, **changes)  # a typo should fail before the store is opened
    return changes


_VALUES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "place": lambda given: Place(**given),
    "asking": _asking,
    "changes": _changes,
}
