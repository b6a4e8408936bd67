"""An answer as it is decoded, and where it came from; shared by `ask` and `chat`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kv_memory.cli.output import Output

if TYPE_CHECKING:
    from kv_memory.config import DecodeSettings
    from kv_memory.memory import Answer, KVMemory

__all__ = ["answer_aloud", "print_cost", "print_sources"]


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
            out.piece("\n")  # also where Ctrl-C came in between
        stream.close()
    if answer.finish_reason == "no_sources":
        out.note("No passage shares a word with the question, so there is nothing to answer from.")
    elif not begun:
        out.note(f"The model's answer is empty. {answer.next_step or ''}".rstrip())
    elif answer.finish_reason == "length":
        out.note("The answer was cut at --max-new-tokens.")
    for document_id in answer.fallbacks:
        out.note(f"The cache of {document_id} was damaged; its text was read instead. Repair: kv-memory add --stale")
    return answer


def print_sources(out: Output, answer: Answer) -> None:
    """Print the passages an answer came from, with their scores."""
    rows = [
        (f"{index}.", source.document_id, source.ordinal, f"{source.score:.2f}")
        for index, source in enumerate(answer.sources, start=1)
    ]
    if rows:
        out.table(("", "Source", "Passage", "Score"), rows, right=("Passage", "Score"))


def print_cost(out: Output, answer: Answer) -> None:
    """Print how soon the answer began, and from what."""
    origin = "distilled caches" if answer.read_from == "caches" else "text in the prompt"
    out.line(
        f"First token after {answer.ttft_s:.2f} s, from {origin}: {answer.n_cached_tokens:,} entries read, "
        f"{answer.n_prompt_tokens:,} tokens prefilled.",
        style="dim",
    )
