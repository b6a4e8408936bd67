"""`kv-memory ask`: one question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kv_memory.cli.answering import answer_aloud, print_cost, print_sources
from kv_memory.cli.opening import load_model, open_memory
from kv_memory.cli.options import (
    DEFAULT_COLLECTION,
    DEFAULT_STORE,
    CollectionOption,
    JsonOption,
    KeepRatioOption,
    KeepTokensOption,
    MaxBytesOption,
    MaxNewTokensOption,
    SeedOption,
    StopOption,
    StoreOption,
    TemperatureOption,
    TextOption,
    TopKOption,
    decode_settings_of,
    kept_of,
)
from kv_memory.cli.output import reporting

if TYPE_CHECKING:
    from kv_memory.answers import ReadFrom

__all__ = ["ask"]


def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="In quotes.")],
    top_k: TopKOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    text: TextOption = False,
    keep_ratio: KeepRatioOption = None,
    keep_tokens: KeepTokensOption = None,
    max_bytes: MaxBytesOption = None,
    store: StoreOption = DEFAULT_STORE,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from the passages that fit it.

    The passages are found by their words (BM25) and read from their distilled caches; their text does not enter the
    prompt, unless --text asks for that.
    """
    with reporting(as_json=as_json) as out:
        settings = decode_settings_of(max_new_tokens, temperature, seed, stop)
        read_from: ReadFrom = "text" if text else "caches"
        kept = kept_of(keep_ratio, keep_tokens, max_bytes)
        with open_memory(out, store, collection, **kept) as memory:
            load_model(out, memory)
            if as_json:
                out.json(memory.ask(question, top_k=top_k, settings=settings, read_from=read_from))
                return
            answer = answer_aloud(out, memory, question, top_k=top_k, settings=settings, read_from=read_from)
            if answer.sources:
                out.line()
                print_sources(out, answer)
                print_cost(out, answer)
