"""`ask` and `chat`: questions from the terminal."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kv_memory.cli.open_store import load_model, open_memory
from kv_memory.cli.options import (
    DEFAULT_COLLECTION,
    DEFAULT_STORE,
    Changes,
    CollectionOption,
    JsonOption,
    MaxNewTokensOption,
    SeedOption,
    StopOption,
    StoreOption,
    TemperatureOption,
    TextOption,
    TopKOption,
    decode_settings_of,
    setting_options,
)
from kv_memory.cli.output import Output, plain, reporting
from kv_memory.errors import KVMemoryError
from kv_memory.settings import KEEP_NAMES, MemorySettings

if TYPE_CHECKING:
    from kv_memory.config import DecodeSettings
    from kv_memory.generate import Answer, ReadFrom
    from kv_memory.memory import KVMemory

__all__ = ["answer_aloud", "answer_json", "ask", "chat", "print_cost", "print_sources", "typed_lines"]


def answer_aloud(
    out: Output,
    memory: KVMemory,
    question: str,
    *,
    top_k: int | None,
    settings: DecodeSettings,
    read_from: Literal["caches", "text"],
) -> Answer:
    """Print the answer to a question piece by piece. Errors as in `KVMemory.ask`."""
    stream = memory.stream(question, top_k=top_k, settings=settings, read_from=read_from)
    begun = False
    try:
        for piece in stream:
            text = piece if begun else piece.lstrip()
            begun = begun or bool(text)
            out.piece(text)
        answer = stream.answer
    finally:
        if begun:
            out.piece("\n")  # also after Ctrl-C
        stream.close()
    if answer.finish_reason == "no_sources":
        out.note("No passage shares a word with the question, so there is nothing to answer from.")
    elif not begun:
        out.note(f"The model's answer is empty. {answer.next_step or ''}".rstrip())
    elif answer.finish_reason == "length":
        out.note("The answer was cut at --max-new-tokens.")
    for document_id in answer.fallbacks:
        out.note(f"The cache of {document_id} was damaged; its text was used instead. Repair: kv-memory add --stale")
    return answer


def answer_json(answer: Answer) -> dict[str, Any]:
    """An answer for `--json`, without what only programs of this package need."""
    left_out = {"token_ids", "damaged"}
    shown = {name: value for name, value in plain(answer).items() if name not in left_out}
    return {**shown, "fallbacks": answer.fallbacks}


def print_sources(out: Output, answer: Answer) -> None:
    """Print the passages an answer came from, with their scores."""
    rows = [
        (f"{index}.", source.document_id, source.ordinal, f"{source.score:.2f}")
        for index, source in enumerate(answer.sources, start=1)
    ]
    if rows:
        out.table(("", "Source", "Passage", "Score"), rows, right=("Passage", "Score"))


def print_cost(out: Output, answer: Answer) -> None:
    """Print the time to first token, and the numbers of entries and tokens behind it."""
    kept = " and ".join(f"{ratio:g}" for ratio in sorted(set(answer.keep_ratios), reverse=True))
    origin = f"distilled caches (keep ratio {kept})" if answer.read_from == "caches" else "text in the prompt"
    out.line(
        f"First token after {answer.ttft_s:.2f} s, from {origin}: {answer.n_cached_tokens:,} cached entries, "
        f"{answer.n_prompt_tokens:,} tokens prefilled.",
        style="dim",
    )


@setting_options(*KEEP_NAMES)
def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, in quotes.")],
    top_k: TopKOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    text: TextOption = False,
    *,
    changes: Changes,
    store: StoreOption = DEFAULT_STORE,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from the passages that match it.

    Passages are found by their words (BM25). The answer is decoded from their distilled caches; their text does not
    enter the prompt, unless --text is given. Caches of the amount given are preferred; a passage without one is
    answered from the cache that it has.
    """
    with reporting(as_json=as_json) as out:
        settings = decode_settings_of(max_new_tokens, temperature, seed, stop)
        read_from: ReadFrom = "text" if text else "caches"
        MemorySettings.resolve({}, **changes)  # a typo should fail before the store is opened
        with open_memory(out, store, collection, **changes) as memory:
            load_model(out, memory)
            if as_json:
                out.json(answer_json(memory.ask(question, top_k=top_k, settings=settings, read_from=read_from)))
                return
            answer = answer_aloud(out, memory, question, top_k=top_k, settings=settings, read_from=read_from)
            if answer.sources:
                out.line()
                print_sources(out, answer)
                print_cost(out, answer)


@setting_options(*KEEP_NAMES)
def chat(
    top_k: TopKOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    text: TextOption = False,
    *,
    changes: Changes,
    store: StoreOption = DEFAULT_STORE,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
) -> None:
    """Ask one question after another.

    Each question is answered on its own: earlier questions and answers are not remembered. Lines may also come from a
    pipe. /sources shows where the last answer came from; /quit or Ctrl-D ends; Ctrl-C stops an answer.
    """
    with reporting(as_json=as_json) as out:
        settings = decode_settings_of(max_new_tokens, temperature, seed, stop)
        read_from: ReadFrom = "text" if text else "caches"
        answers: list[Answer] = []
        MemorySettings.resolve({}, **changes)  # a typo should fail before the store is opened
        with open_memory(out, store, collection, **changes) as memory:
            load_model(out, memory)
            if sys.stdin.isatty():
                out.note("Each question is answered on its own; earlier ones are not remembered. /sources, /quit")
            for line in typed_lines(out):
                if line == "/quit":
                    break
                if line == "/sources":
                    _show_sources(out, answers)
                elif line.startswith("/"):
                    out.note(f"{line}: no such command. Use /sources or /quit.")
                elif as_json:
                    answers.append(memory.ask(line, top_k=top_k, settings=settings, read_from=read_from))
                else:
                    try:
                        answers.append(
                            answer_aloud(out, memory, line, top_k=top_k, settings=settings, read_from=read_from)
                        )
                    except KeyboardInterrupt:
                        out.note("Stopped.")
                    except KVMemoryError as error:
                        if not sys.stdin.isatty():
                            raise
                        out.error(error.to_dict())  # the next question may succeed
        if as_json:
            out.json({"answers": [answer_json(answer) for answer in answers]})


def typed_lines(out: Output) -> Iterator[str]:
    """Stripped lines from stdin, without blank ones; on a terminal with a prompt."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):  # not on Windows; importing it gives input() line editing and a history
        importlib.import_module("readline")
    while True:
        try:
            line = input("" if out.as_json else "? ").strip()
        except EOFError:
            out.note("")
            return
        except KeyboardInterrupt:
            out.note("")  # so that later output starts on its own line
            raise
        if line:
            yield line


def _show_sources(out: Output, answers: list[Answer]) -> None:
    if out.as_json:
        return  # the JSON object has them
    if not answers or not answers[-1].sources:
        out.note("There are no sources yet." if not answers else "The last answer had no sources.")
        return
    print_sources(out, answers[-1])
    for source in answers[-1].sources:
        out.line()
        if source.text is None:
            out.note(f"The text of {source.document_id}, passage {source.ordinal}, is not kept.")
        else:
            out.line(source.text)
