"""`ask` and `chat`: questions from the terminal."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kv_memory.cli.options import Changes, Place, command, pairs_of
from kv_memory.cli.output import Name, Output, plain
from kv_memory.config import DecodeSettings
from kv_memory.errors import ConfigError, KVMemoryError
from kv_memory.settings import KEEP_NAMES

if TYPE_CHECKING:
    from kv_memory.generate import Answer, AnswerStream


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Options of an answer.

    Attributes:
        top_k (N): Maximum number of passages to answer from.  [default: 1 for smollm2 and qwen-0.5b, 3 for
            others]
        id_ (ID): Document to search; repeatable.  [default: all]
        where (KEY=VALUE): Search only documents with this metadata; repeatable: several values of a key admit each of
            them, several keys must all match.
        min_score (SCORE): Least score of a passage, as `Sources` shows it.
        max_new_tokens (N): Maximum length of an answer in tokens.
        temperature (T): 0 decodes greedily; above 0 samples.
        seed (N): Seed for repeatable sampling.  [default: random]
        stop (STRING): String that ends the answer, not included in it; repeatable.
        text: Put the text of the passages into the prompt, as plain RAG does, to compare; needs documents added with
            --keep-text.
    """

    top_k: int | None = None
    id_: list[str] | None = None
    where: list[str] | None = None
    min_score: float | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int | None = None
    stop: list[str] | None = None
    text: bool = False

    def arguments(self) -> dict[str, Any]:
        """Arguments of `KVMemory.ask`; errors as in `DecodeSettings` and `pairs_of`."""
        wanted: dict[str, list[Any]] = {}
        for name, value in pairs_of(self.where or (), option="--where"):
            wanted.setdefault(name, []).extend(_meanings(value))
        settings = DecodeSettings(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            stop=tuple(self.stop or ()),
        )
        return {
            "top_k": self.top_k,
            "document_ids": self.id_,
            "filter": wanted or None,
            "min_score": self.min_score,
            "settings": settings,
            "read_from": "text" if self.text else "caches",
        }


def _meanings(value: str) -> list[Any]:
    """A text, and the number, truth value or null that it may stand for: only the metadata know which is meant."""
    try:
        found = json.loads(value)
    except ValueError:
        return [value]
    return [value] if isinstance(found, str | list | dict) else [value, found]


def _answer_aloud(out: Output, stream: AnswerStream) -> Answer:
    """Print the answer to a question piece by piece. Errors as in `KVMemory.ask`."""
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
        out.note("No passage matches the question, so there is nothing to answer from.")
    elif not begun:
        out.note(f"The model's answer is empty. {answer.next_step or ''}".rstrip())
    elif answer.finish_reason == "length":
        out.note("The answer was cut at --max-new-tokens.")
    for document_id in answer.fallbacks:
        out.note(f"The cache of {document_id} was damaged; its text was used instead. Repair: kv-memory add --stale")
    return answer


def _answer_json(answer: Answer) -> dict[str, Any]:
    """An answer for `--json`, without what only programs of this package need."""
    left_out = {"token_ids", "damaged"}
    shown = {name: value for name, value in plain(answer).items() if name not in left_out}
    return {**shown, "fallbacks": answer.fallbacks}


def _print_sources(out: Output, answer: Answer) -> None:
    """Print the passages an answer came from, with their scores."""
    rows = [
        (f"{index}.", Name(source.document_id), source.ordinal, f"{source.score:.2f}")
        for index, source in enumerate(answer.sources, start=1)
    ]
    if rows:
        out.table(("", "Source", "Passage", "Score"), rows, right=("Passage", "Score"))


def _print_cost(out: Output, answer: Answer) -> None:
    """Print the time to first token, and the numbers of entries and tokens behind it."""
    kept = " and ".join(f"{ratio:g}" for ratio in sorted(set(answer.keep_ratios), reverse=True))
    origin = f"distilled caches (keep ratio {kept})" if answer.read_from == "caches" else "text in the prompt"
    out.line(
        f"First token after {answer.ttft_s:.2f} s, from {origin}: {answer.n_cached_tokens:,} cached entries, "
        f"{answer.n_prompt_tokens:,} tokens prefilled.",
        style="dim",
    )


@command(*KEEP_NAMES, "retriever")
def ask(question: str, *, weights: str = "plain", asking: Asking, changes: Changes, place: Place, out: Output) -> Any:
    """Answer a question from the passages that match it.

    Passages are found by the store's retriever. The answer is decoded from their distilled caches; their text does not
    enter the prompt, unless --text is given. Caches of the amount given are preferred; a passage without one is
    answered from the cache that it has.

    Options:
        question (QUESTION): The question, in quotes.
        weights (NAME): `plain`, or `int8`: about 0.6 of the time a token on a CPU, and a little less exact.
    """
    given = asking.arguments()
    out.stopped = "The store is unchanged; run the same command to ask again."
    with place.open_memory(out, weights=weights, **changes) as memory:
        if out.as_json:
            return _answer_json(memory.ask(question, **given))
        answer = _answer_aloud(out, memory.stream(question, **given))
        if answer.sources:
            out.line()
            _print_sources(out, answer)
            _print_cost(out, answer)


@command(*KEEP_NAMES, "retriever")
def chat(*, weights: str = "plain", asking: Asking, changes: Changes, place: Place, out: Output) -> Any:
    """Ask one question after another.

    Each question is answered on its own: earlier questions and answers are not remembered. Lines may also come from a
    pipe. /sources shows where the last answer came from; /quit or Ctrl-D ends; Ctrl-C stops an answer.

    Options:
        weights (NAME): `plain`, or `int8`: about 0.6 of the time a token on a CPU, and a little less exact.
    """
    answers: list[Answer] = []
    out.stopped = "The store is unchanged; run the same command to ask other questions."
    given, lines = asking.arguments(), _typed_lines(out)
    if not sys.stdin.isatty():  # asked before the model is loaded, which would be for nothing
        first = next(lines, None)
        if first is None:
            place.open_store(out).close()  # an error of the store comes first
            raise ConfigError("no question on stdin", where="stdin", next_step="Write one question a line.")
        lines = itertools.chain([first], lines)
    with place.open_memory(out, weights=weights, **changes) as memory:
        if sys.stdin.isatty():
            out.note("Each question is answered on its own; earlier ones are not remembered. /sources, /quit")
        for line in lines:
            if line == "/quit":
                break
            if line == "/sources":
                _show_sources(out, answers)
            elif line.startswith("/"):
                out.note(f"{line}: no such command. Use /sources or /quit.")
            elif out.as_json:
                answers.append(memory.ask(line, **given))
            else:
                try:
                    answers.append(_answer_aloud(out, memory.stream(line, **given)))
                except KeyboardInterrupt:
                    out.note("Stopped.")
                except KVMemoryError as error:
                    if not sys.stdin.isatty():
                        raise
                    out.error(error.to_dict())  # the next question may succeed
    return {"answers": [_answer_json(answer) for answer in answers]}


def _typed_lines(out: Output) -> Iterator[str]:
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
    if not answers or not answers[-1].sources:
        out.note("There are no sources yet." if not answers else "The last answer had no sources.")
        return
    _print_sources(out, answers[-1])
    for source in answers[-1].sources:
        out.line()
        if source.text is None:
            out.note(f"The text of {source.document_id}, passage {source.ordinal}, is not kept.")
        else:
            out.line(source.text)
