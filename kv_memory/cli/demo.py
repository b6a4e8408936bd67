"""`kv-memory demo`: answers from distilled caches and from text, side by side, measured live on this machine."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from kv_memory.cli.demo_documents import QUESTIONS, Question, known_questions, package_documents
from kv_memory.cli.options import Changes, command
from kv_memory.cli.output import Output, plain, size_rows
from kv_memory.cli.progress import track_add
from kv_memory.config import DecodeSettings
from kv_memory.errors import ConfigError
from kv_memory.model.embedded import BUILT_IN
from kv_memory.settings import KEEP_NAMES, MemorySettings

if TYPE_CHECKING:
    from kv_memory.documents import Document
    from kv_memory.generate import ReadFrom
    from kv_memory.memory import KVMemory

_WAYS: tuple[ReadFrom, ReadFrom] = ("caches", "text")
_NAMES = ("cached", "text")  # the same in the names of counts


@command("model", *KEEP_NAMES)
def demo(
    *, docs: Path | None = None, changes: Changes, questions: Path | None = None, limit: int | None = None, out: Output
) -> Any:
    """Try it: answers from distilled caches and from text, side by side.

    Documents are compressed, then each question is answered both ways by the same model, over the same passage. By
    default these are the first paragraphs of the descriptions of some Python packages installed here, with questions
    whose answers are known, which takes half a minute to two minutes. Nothing is prepared in advance.

    Options:
        docs (FOLDER): Your documents.
        questions (FILE): Yours, one a line.
        limit (N): Maximum number of questions.
    """
    with ExitStack() as stack:
        if limit is not None and limit < 1:
            raise ConfigError(f"--limit must be at least 1, got {limit}", where="--limit")
        if not changes.keys() & set(KEEP_NAMES):
            changes["keep_ratio"] = "1/8"
        settings = MemorySettings.resolve({}, **changes, keep_text=True)
        documents, asked = _chosen(docs, questions, limit)
        out.stopped = "The temporary store is deleted; run the same command again."
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-memory-demo-"))
        with out.working(f"Loading the model ({settings.model})"):
            from kv_memory.memory import KVMemory

            # The texts are kept, because every question is also answered from text.
            memory = KVMemory.open(folder, settings, collection="demo")
            stack.enter_context(memory).load()
        with track_add(out) as tracker:
            report = memory.add(documents, on_progress=tracker)
        sizes = ("n_passages", "n_tokens", "full_kv_bytes", "cache_bytes", "elapsed_s")
        compressed = {"n_documents": len(documents)} | {name: getattr(report, name) for name in sizes}
        compressed["factor"] = report.full_kv_bytes / report.cache_bytes
        compressed["tokens_per_s"] = report.n_tokens / report.elapsed_s
        ids = [document.id for document in documents]
        name = memory.settings.model
        out.line(f"The model is {BUILT_IN[name].title if name in BUILT_IN else name}.", style="bold")
        out.line(f"The documents are {', '.join(ids)}.")
        took = f"in {report.elapsed_s:.0f} s, {compressed['tokens_per_s']:,.0f} tokens/s"
        out.table(("", ""), [("Compressed", took), *size_rows(report.full_kv_bytes, report.cache_bytes)])
        out.line("Each question is answered from a passage's distilled cache, and with its text in the prompt.")
        for way in _WAYS:  # otherwise the first question would pay for everything that is set up on first use
            memory.ask(asked[0].text, top_k=1, settings=DecodeSettings(max_new_tokens=1), read_from=way)
        results = [_answered(out, memory, question, flip=i % 2 == 1) for i, question in enumerate(asked)]
        medians = _medians(results)
        if medians is not None:
            _conclude(out, medians)
        ends = ("questions", "known", "both_empty")
        counts = [f"n_{end}" for end in ends] + [f"{kind}_{way}" for kind in ("right", "empty") for way in _NAMES]
        summary = {name: medians and medians[name] for name in counts} | {"factor": compressed["factor"]}
        dtype, device = str(memory.backbone.dtype).removeprefix("torch."), str(memory.backbone.device)
        summary |= {"settings": memory.settings, "dtype": dtype, "device": device, "compressed": compressed}
        return summary | {"documents": ids, "questions": results, "medians": medians}


def _chosen(docs: Path | None, file: Path | None, limit: int | None) -> tuple[list[Document], list[Question]]:
    from kv_memory.documents import read_documents, read_file

    if (docs is None) != (file is None):
        raise ConfigError("--docs and --questions go together", where="--docs", next_step="Pass both, or neither.")
    if docs is not None and file is not None:
        asked = [Question(line.strip()) for line in read_file(file).text.splitlines() if line.strip()][:limit]
        return list(read_documents(docs).documents), asked
    asked = known_questions(package_documents(), QUESTIONS)[:limit]
    return package_documents(list(dict.fromkeys(question.package for question in asked))), asked


def _answered(out: Output, memory: KVMemory, question: Question, *, flip: bool) -> dict[str, Any]:
    """A question answered both ways, from text first if `flip`."""
    from kv_memory.evaluate.metrics import contains

    settings, known = DecodeSettings(max_new_tokens=24), question.accepted
    order = _WAYS[::-1] if flip else _WAYS
    answers = {way: memory.ask(question.text, top_k=1, settings=settings, read_from=way) for way in order}
    caches, text = answers["caches"], answers["text"]
    right = [bool(contains(answer.text, known)) if known else None for answer in (caches, text)]
    found = caches.sources[0].document_id if caches.sources else None
    out.line(f"\n{question.text}", style="bold")
    for way, answer, is_right in zip(_WAYS, (caches, text), right, strict=True):
        judged = {True: "right", False: "wrong", None: ""}[is_right]
        out.line(f"  {way:<6}  {answer.text or '(nothing)'}  [{answer.ttft_s:.3f} s to first token]  {judged}")
    if found is None:
        out.line("  no passage matches this question")
    result = {"question": question.text, "accepted": known, "document_id": found, "caches": plain(caches)}
    result |= {"text": plain(text), "ttft_ratio": None if found is None else text.ttft_s / caches.ttft_s}
    return result | {"right_cached": right[0], "right_text": right[1]}


def _medians(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Counts, medians and totals over the questions with a passage; None if no question has one."""
    counted = [result for result in results if result["document_id"] is not None]
    if not counted:
        return None
    known = [result for result in counted if result["accepted"]]
    pairs = [[result[way]["text"].strip().rstrip(".").casefold() for way in _WAYS] for result in counted]
    found: dict[str, Any] = {"n_questions": len(counted), "n_known": len(known)}
    for index, (way, name) in enumerate(zip(_WAYS, _NAMES, strict=True)):
        found[f"right_{name}"] = sum(result[f"right_{name}"] for result in known) if known else None
        found[f"empty_{name}"] = sum(not pair[index] for pair in pairs)
        found[f"{way}_ttft_s"] = median(result[way]["ttft_s"] for result in counted)
        found[f"{way}_total_s"] = sum(result[way]["total_s"] for result in counted)
    found["n_both_empty"] = pairs.count(["", ""])
    found["n_same"] = sum(cached == text != "" for cached, text in pairs)  # two empty answers are no agreement
    return found | {"ttft_ratio": found["text_ttft_s"] / found["caches_ttft_s"]}


def _conclude(out: Output, found: dict[str, Any]) -> None:
    n, known = found["n_questions"], found["n_known"]
    rows = [("Right answers", *(f"{found[f'right_{way}']} of {known}" for way in _NAMES))] if known else []
    rows += [("Empty answers", *(f"{found[f'empty_{way}']} of {n}" for way in _NAMES))]
    rows += [("Median time to first token", *(f"{found[f'{way}_ttft_s']:.3f} s" for way in _WAYS))]
    rows += [("All answers", *(f"{found[f'{way}_total_s']:.1f} s" for way in _WAYS))]
    out.line()
    out.table(("", "Distilled caches", "Text"), rows)
    out.line(f"First token {found['ttft_ratio']:.1f}x sooner; the same answer both ways to {found['n_same']} of {n}.")
