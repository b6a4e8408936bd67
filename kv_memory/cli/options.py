"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import typer

from kv_memory.cache.keep import given_keep
from kv_memory.config import DecodeSettings, check_keep_ratio
from kv_memory.errors import ConfigError

__all__ = [
    "DEFAULT_COLLECTION",
    "DEFAULT_STORE",
    "AdapterOption",
    "CollectionOption",
    "JsonOption",
    "KeepRatioOption",
    "KeepTextOption",
    "KeepTokensOption",
    "Kept",
    "MaxBytesOption",
    "MaxNewTokensOption",
    "MinFidelityOption",
    "ModelOption",
    "PassageTokensOption",
    "PromptOption",
    "RefineOption",
    "SeedOption",
    "SelectorOption",
    "StopOption",
    "StorageOption",
    "StoreOption",
    "TemperatureOption",
    "TextOption",
    "TopKOption",
    "decode_settings_of",
    "kept_of",
    "passage_tokens_of",
    "ratio_of",
    "seconds_of",
    "size_of",
]

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="KV_MEMORY_STORE", metavar="FOLDER", help="The store's folder.")
]
CollectionOption = Annotated[str, typer.Option("--collection", metavar="NAME", help="Collection in the store.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object; errors as {'error': ...} with exit code 1 or 2.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="A built-in model (qwen-0.5b, smollm2), a model folder, or a Hugging Face hub id.  [default: the store's; "
        "in a new store qwen-0.5b, or smollm2 if only that is prepared]",
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="A trained adapter of that model, or 'none'.  [default: the store's; in a new store 'shipped' for "
        "smollm2, none for others]",
    ),
]
KeepRatioOption = Annotated[
    str | None,
    typer.Option(
        "--keep-ratio",
        metavar="SHARE",
        help="Share of the tokens kept: 0.125 or 1/8.  [default: the store's; in a new store 1/4]",
    ),
]
KeepTokensOption = Annotated[
    int | None,
    typer.Option(
        "--keep-tokens",
        metavar="N",
        help="Instead of --keep-ratio: number of tokens kept of each passage, whatever its length.",
    ),
]
MaxBytesOption = Annotated[
    str | None,
    typer.Option(
        "--max-bytes",
        metavar="SIZE",
        help="Instead of --keep-ratio: maximum size of a passage's cache file, e.g. 300KB or 2MB.",
    ),
]
SelectorOption = Annotated[
    str | None,
    typer.Option(
        "--selector",
        metavar="NAME",
        help="Select entries without an adapter: matched (closest), reconstruction (half the time), attention "
        "(fastest) or sink_recent. With an adapter: combined (closer than the adapter alone, in twice the time).  "
        "[default: the store's; in a new store the adapter, or matched without one]",
    ),
]
RefineOption = Annotated[
    int | None,
    typer.Option(
        "--refine",
        metavar="STEPS",
        help="Refine every passage's cache by this number of gradient steps: 8 or 48, or 144 if little is kept. It "
        "comes closer to the full cache, for about 70, 270 or many hundred prefills. 0 for none.  [default: the "
        "store's; in a new store 0]",
    ),
]
MinFidelityOption = Annotated[
    float | None,
    typer.Option(
        "--min-fidelity",
        metavar="KL",
        help="Continue refining until the KL to the full cache on held-out probes is at most this, in nats, or 192 "
        "steps are done.  [default: the store's; in a new store no target]",
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="NAME",
        help="Storage type of caches: auto (the model's own), float32, bfloat16, float16, or int8 (half of bfloat16). "
        "Applies to new caches; stored ones stay unchanged.  [default: the store's; in a new store int8 for smollm2, "
        "auto for others]",
    ),
]
KeepTextOption = Annotated[
    bool | None,
    typer.Option(
        "--keep-text/--no-keep-text",
        help="Keep the text of added documents: to show it, to use it if a cache is damaged, and for ask --text. "
        "Without it the store has caches, ids, metadata and hashes of words. An unchanged document that is added again "
        "gets or loses its text without being compressed.  [default: the store's; in a new store --no-keep-text]",
    ),
]
PassageTokensOption = Annotated[
    str,
    typer.Option(
        "--passage-tokens",
        metavar="N",
        help="Maximum length of a passage in tokens; 'whole' does not split documents; 'auto' is the store's, in a new "
        "store 256 for smollm2 and 1024 for others.",
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="NAME",
        help="Prompt form: auto, chat, brief or passage.  [default: the store's; in a new store auto]",
    ),
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


def passage_tokens_of(text: str) -> int | Literal["auto"] | None:
    """The value of `--passage-tokens`: a number, None for `whole`, or `auto`.

    Raises:
        ConfigError: `text` is something else.
    """
    if text == "auto":
        return "auto"
    if text == "whole":
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"--passage-tokens must be a number, 'whole' or 'auto', got {text!r}",
            where="passage_tokens",
            next_step="Pass for example --passage-tokens 512.",
        ) from None


class Kept(TypedDict):
    """The amount to keep, under the names of the settings; at most one value is not None."""

    keep_ratio: float | None
    keep_tokens: int | None
    max_bytes: int | None


def kept_of(keep_ratio: str | None, keep_tokens: int | None, max_bytes: str | None) -> Kept:
    """The values of `--keep-ratio`, `--keep-tokens` and `--max-bytes`.

    Raises:
        ConfigError: A value is invalid, or several options are given.
    """
    kept: Kept = {
        "keep_ratio": None if keep_ratio is None else ratio_of(keep_ratio),
        "keep_tokens": keep_tokens,
        "max_bytes": None if max_bytes is None else size_of(max_bytes, where="--max-bytes"),
    }
    given_keep(**kept)  # for its checks only, before a model is loaded
    return kept


def decode_settings_of(
    max_new_tokens: int, temperature: float, seed: int | None, stop: list[str] | None
) -> DecodeSettings:
    """The decoding options of a command as settings.

    Raises:
        ConfigError: A value is out of range.
    """
    return DecodeSettings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=tuple(stop or ()))


_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TIMES = {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def size_of(text: str, *, where: str) -> int:
    """The number of bytes of a size, e.g. `500MB` (10^6) or `2GiB` (2^30).

    Raises:
        ConfigError: `text` is not a size above 0.
    """
    return int(_of(text, _SIZES, where, "500MB, 20GB or 2GiB"))


def seconds_of(text: str, *, where: str) -> float:
    """The number of seconds of a duration, e.g. `90s`, `12h`, `30d`.

    Raises:
        ConfigError: `text` is not a duration above 0.
    """
    return _of(text, _TIMES, where, "90s, 12h or 30d")


def ratio_of(text: str) -> float:
    """The value of a share written as `0.25` or `1/4`.

    Raises:
        ConfigError: `text` is neither, or the value is not in (0, 1].
    """
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ConfigError(
            f"--keep-ratio must be a number or a fraction, got {text!r}",
            where="keep_ratio",
            next_step="Pass for example --keep-ratio 0.25 or --keep-ratio 1/4.",
        ) from None
    return check_keep_ratio(value)


def _of(text: str, units: dict[str, int], where: str, examples: str) -> float:
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        raise ConfigError(f"invalid value {text!r}", where=where, next_step=f"Write it like {examples}.")
    return float(found[1]) * units[found[2].lower()]
