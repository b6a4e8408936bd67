"""Which prompt form does a model answer best in? On questions that no table of this project uses.

    python benchmarks/prompts.py                                    # a table: the built-in models, chat and passage
    python benchmarks/prompts.py --model qwen-0.5b --form chat chat_brief --n-questions 100 --json

Every question is answered greedily from the full text of its passage, in every form; nothing is compressed. Questions
are of SQuAD's *training* share (and of Dolly, `--data dolly`), one to each passage, chosen by the hash of the passage.
The default forms of the built-in models (`kv_memory/embedded.py`) are chosen by these figures; dev is left to the
tables.

    f1, em, contains      of the answers, as in `kv-memory eval`
    empty                 share of answers in which nothing can be seen
    cut                   share of answers that --max-tokens cut off
    n_words               words of an answer, a mean
    seconds               for a question, prefill of the text included, a median

Forms are `chat` and `passage`, as `--prompt` takes them, and trials: see TRIALS. What a trial would change is part of a
cache's fingerprint, so that a form that is in use is never reworded: a better one gets a name of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kv_memory import DecodeSettings
from kv_memory.backbone import Backbone
from kv_memory.datasets import read_examples
from kv_memory.evaluate.cases import in_hash_order
from kv_memory.evaluate.metrics import contains, exact_match, f1
from kv_memory.generate import Generation, Generator
from kv_memory.opening import is_visible
from kv_memory.prompts import PASSAGE, PromptForm, chat_form, choose_form

MAX_DOCUMENT_TOKENS = 256
# The chat form with other instructions.
TRIALS = {
    "chat_brief": "Answer the question from the documents. Answer briefly.",
    "chat_few_words": "Answer the question with a few words from the documents. If they do not hold the answer, say so.",
    "chat_examples": PASSAGE.prefix.strip(),
}


def main() -> None:
    """Ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["smollm2", "qwen-0.5b"], help="(default: smollm2 qwen-0.5b)")
    parser.add_argument(
        "--form", nargs="+", default=["chat", "passage"], choices=["chat", "passage", *TRIALS], metavar="FORM"
    )
    parser.add_argument("--data", default="squad", choices=["squad", "dolly"], help="training share of (default: squad)")
    parser.add_argument("--n-questions", type=int, default=100, help="(default: 100)")
    parser.add_argument("--max-tokens", type=int, default=32, help="longest answer (default: 32)")
    parser.add_argument("--dtype", default="auto", help="(default: auto)")
    parser.add_argument("--answers", type=Path, help="write every answer there, JSON lines")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    first = True
    for model in args.model:
        backbone = Backbone.load(model, dtype=args.dtype)
        asked = questions(backbone, args.data, args.n_questions)
        for form in args.form:
            row = measure(backbone, form, asked, args)
            print(json.dumps(row) if args.json else table_line(row, first=first), flush=True)
            first = False


def questions(backbone: Backbone, data: str, n: int) -> list[tuple[str, str, tuple[str, ...]]]:
    """Text, question and references, one to a text."""
    found = []
    for example in in_hash_order(read_examples(data, split="train")):
        if len(found) == n:
            break
        if example.questions and backbone.count_tokens([example.context])[0] <= MAX_DOCUMENT_TOKENS:
            question = example.questions[len(found) % len(example.questions)]
            found.append((example.context, question.text, question.answers))
    return found


def form_of(name: str, backbone: Backbone) -> PromptForm:
    """A form in use, or a trial."""
    if name in TRIALS:
        return chat_form(backbone.tokenizer, system_prompt=TRIALS[name])
    return choose_form("passage" if name == "passage" else "chat", backbone.tokenizer)


def measure(
    loaded: Backbone, form: str, asked: Sequence[tuple[str, str, tuple[str, ...]]], args: argparse.Namespace
) -> dict[str, Any]:
    """One model in one form."""
    backbone = Backbone(
        loaded.model,
        loaded.tokenizer,
        prompt=form_of(form, loaded),
        name=loaded.name,
        weights_sha256=loaded.weights_sha256,
    )
    generator, settings = Generator(backbone), DecodeSettings(max_new_tokens=args.max_tokens)
    said: list[Generation] = []
    for number, (text, question, references) in enumerate(asked, start=1):
        run = generator.start([question], texts=[text], settings=settings)
        for _ in run.steps():
            pass
        said += run.results()
        if args.answers:
            line = {"model": loaded.name, "form": form, "question": question, "answers": references}
            with args.answers.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "said": said[-1].text.strip()}) + "\n")
        if sys.stderr.isatty():
            print(f"\r{loaded.name} {form} {number}/{len(asked)}", end="", file=sys.stderr)
    texts = [one.text.strip() for one in said]
    pairs = [(text, references) for text, (_, _, references) in zip(texts, asked, strict=True)]
    return {
        "model": loaded.name,
        "form": form,
        "data": args.data,
        "n_questions": len(asked),
        "f1": statistics.mean(f1(*pair) for pair in pairs),
        "em": statistics.mean(exact_match(*pair) for pair in pairs),
        "contains": statistics.mean(contains(*pair) for pair in pairs),
        "empty": statistics.mean(not is_visible(text) for text in texts),
        "cut": statistics.mean(one.finish_reason == "length" for one in said),
        "n_words": statistics.mean(len(text.split()) for text in texts),
        "seconds": statistics.median(one.total_s for one in said),
    }


def table_line(row: dict[str, Any], *, first: bool) -> str:
    """A row of a Markdown table; the first one brings the head."""
    figures = " | ".join(f"{row[name]:.3f}" for name in ("f1", "em", "contains", "empty", "cut"))
    line = f"| {row['model']} | {row['form']} | {figures} | {row['n_words']:.1f} | {row['seconds']:.2f} |"
    head = "| model | form | F1 | EM | contains | empty | cut | words | seconds |\n| --- | --- " + "|---:" * 7 + "|\n"
    return head + line if first else line


if __name__ == "__main__":
    main()
