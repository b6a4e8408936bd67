"""Options that several commands share; those of the settings are made from the fields of `MemorySettings`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from kv_memory.config import DecodeSettings
from kv_memory.settings import MemorySettings, new_value_text

__all__ = [
    "DEFAULT_COLLECTION",
    "DEFAULT_STORE",
    "Changes",
    "CollectionOption",
    "JsonOption",
    "MaxNewTokensOption",
    "SeedOption",
    "StopOption",
    "StoreOption",
    "TemperatureOption",
    "TextOption",
    "TopKOption",
    "decode_settings_of",
    "setting_options",
]

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="KV_MEMORY_STORE", metavar="FOLDER", help="The store's folder.")
]
CollectionOption = Annotated[str, typer.Option("--collection", metavar="NAME", help="Collection in the store.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; errors as {'error': ...} with exit code 1 or 2.")
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        metavar="N",
        help="Maximum number of passages to answer from.  [default: 1 for smollm2, 3 for others]",
    ),
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="Maximum length of an answer in tokens.")
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", metavar="T", help="0 decodes greedily; above 0 samples.")
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Seed for repeatable sampling.  [default: random]")
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="STRING", help="String that ends the answer, not included in it; repeatable."),
]
TextOption = Annotated[
    bool,
    typer.Option(
        "--text",
        help="Put the text of the passages into the prompt, as plain RAG does, to compare; needs documents added with "
        "--keep-text.",
    ),
]

DEFAULT_STORE = Path("kv-memory-store")
DEFAULT_COLLECTION = "default"


Changes = dict[str, Any]  # settings that were given, for `MemorySettings.resolve`


def setting_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of some settings; those that were given are its argument `changes`.

    Args:
        names: Fields of `MemorySettings`; none means all that have an option. Their values are parsed by
            `MemorySettings.resolve`, so that its errors are reported as those of the command.
    """
    options = {
        field.name: _setting_option(field)
        for field in dataclasses.fields(MemorySettings)
        if field.metadata and (not names or field.name in names)
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_changes(**values: Any) -> None:
            given = {name: values.pop(name) for name in options}
            command(**values, changes={name: value for name, value in given.items() if value is not None})

        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            parameters += options.values() if parameter.name == "changes" else [parameter]
        # typer takes the options from here.
        with_changes.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_changes.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_changes

    return decorate


def _setting_option(field: dataclasses.Field[Any]) -> inspect.Parameter:
    """The option of a setting; None if it is not given."""
    hint = get_type_hints(MemorySettings)[field.name]
    plain = [kind for kind in (bool, int, float) if kind is hint or kind in get_args(hint)]
    kind: Any = str if field.metadata["parse"] is not None or not plain else plain[0]
    new = new_value_text(field.name)
    help_ = field.metadata["help"] + (f"  [default: the store's; in a new store {new}]" if new else "")
    name = field.metadata["option"] or "--" + field.name.replace("_", "-")
    option = typer.Option(name, metavar=field.metadata["metavar"] or None, help=help_)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def decode_settings_of(
    max_new_tokens: int, temperature: float, seed: int | None, stop: list[str] | None
) -> DecodeSettings:
    """The decoding options of a command as settings.

    Raises:
        ConfigError: A value is out of range.
    """
    return DecodeSettings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=tuple(stop or ()))
