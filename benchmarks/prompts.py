"""Which prompt form does a model answer best in? On questions that no table of this project uses.

    python benchmarks/prompts.py                                    # a table: the built-in models, three forms
    python benchmarks/prompts.py --model qwen-0.5b --form chat brief chat_briefly --n-questions 100 --json

Every question is answered greedily from the full cache of its passage, in every form; nothing is compressed.
Questions are from SQuAD's *training* share (or Dolly, `--data dolly`), at most five per passage, and passages are
chosen by their hash. The default forms of the built-in models (`kv_memory/model/embedded.py`) are chosen by these
figures; dev is left to the tables.

    f1, em, contains      of the answers, as in `kv-memory eval`
    empty                 share of answers without a visible character
    cut                   share of answers that --max-tokens cut off
    n_words               words per answer, a mean
    seconds               per question, with its share of the passage's prefill; questions about one passage are a batch

Forms are `chat`, `brief` and `passage`, as `--prompt` takes them, and trials: see TRIALS. What a trial would change is
part of a cache's fingerprint, so a form in use is never reworded: a better one gets a new name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from kv_memory import DecodeSettings
from kv_memory.compress import Compressor
from kv_memory.datasets import Example, Question, read_examples
from kv_memory.evaluate.metrics import contains, exact_match, f1
from kv_memory.evaluate.tasks.task import in_hash_order
from kv_memory.generate import Answer, Generator
from kv_memory.model.backbone import Backbone
from kv_memory.model.first_token import is_visible
from kv_memory.model.prompts import PASSAGE, PromptForm, PromptName, chat_form, choose_form

MAX_DOCUMENT_TOKENS, MAX_QUESTIONS = 256, 5
# The chat form with other instructions.
TRIALS = {
    "chat_briefly": "Answer the question from the documents. Answer briefly.",
    "chat_examples": PASSAGE.prefix.strip(),
}


def main() -> None:
    """Ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["smollm2", "qwen-0.5b"], help="(default: smollm2 qwen-0.5b)")
    parser.add_argument(
        "--form",
        nargs="+",
        default=["chat", "brief", "passage"],
        choices=["chat", "brief", "passage", *TRIALS],
        metavar="FORM",
    )
    parser.add_argument(
        "--data", default="squad", choices=["squad", "dolly"], help="data set, training share (default: squad)"
    )
    parser.add_argument("--n-questions", type=int, default=100, help="(default: 100)")
    parser.add_argument("--max-tokens", type=int, default=32, help="longest answer (default: 32)")
    parser.add_argument("--dtype", default="auto", help="(default: auto)")
    parser.add_argument("--answers", type=Path, help="write every answer there, JSON lines")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args()
    first = True
    for model in args.model:
        backbone = Backbone.load(model, dtype=args.dtype)
        asked = passages(backbone, args.data, args.n_questions)
        for form in args.form:
            row = measure(backbone, form, asked, args)
            print(json.dumps(row) if args.json else table_line(row, first=first), flush=True)
            first = False


def passages(backbone: Backbone, data: str, n_questions: int) -> list[Example]:
    """Passages with at most `MAX_QUESTIONS` questions each, `n_questions` in all."""
    found: list[Example] = []
    for example in in_hash_order(read_examples(data, split="train")):
        left = n_questions - sum(len(one.questions) for one in found)
        if left == 0:
            break
        if example.questions and backbone.count_tokens([example.context])[0] <= MAX_DOCUMENT_TOKENS:
            found.append(replace(example, questions=example.questions[: min(left, MAX_QUESTIONS)]))
    return found


def form_of(name: str, backbone: Backbone) -> PromptForm:
    """A form in use, or a trial."""
    if name in TRIALS:
        return chat_form(backbone.tokenizer, system_prompt=TRIALS[name])
    return choose_form(cast("PromptName", name), backbone.tokenizer)


def measure(loaded: Backbone, form: str, asked: Sequence[Example], args: argparse.Namespace) -> dict[str, Any]:
    """One model in one form."""
    backbone = Backbone(
        loaded.model,
        loaded.tokenizer,
        prompt=form_of(form, loaded),
        name=loaded.name,
        weights_sha256=loaded.weights_sha256,
    )
    compressor, generator = Compressor(backbone, selector="sink_recent"), Generator(backbone)
    said: list[tuple[Answer, Question]] = []
    start_s = time.perf_counter()
    for passage in asked:
        cache = compressor.compress(passage.context, keep_ratio=1.0)
        answers = generator.generate_batch(
            [question.text for question in passage.questions],
            [cache],
            settings=DecodeSettings(max_new_tokens=args.max_tokens),
        )
        said += zip(answers, passage.questions, strict=True)
        if args.answers:
            with args.answers.open("a", encoding="utf-8") as file:
                for one, question in zip(answers, passage.questions, strict=True):
                    line = {"model": loaded.name, "form": form, "question": question.text, "answers": question.answers}
                    file.write(json.dumps({**line, "said": one.text.strip()}) + "\n")
    elapsed_s = time.perf_counter() - start_s
    pairs = [(one.text.strip(), question.answers) for one, question in said]
    return {
        "model": loaded.name,
        "form": form,
        "data": args.data,
        "n_questions": len(said),
        "f1": statistics.mean(f1(*pair) for pair in pairs),
        "em": statistics.mean(exact_match(*pair) for pair in pairs),
        "contains": statistics.mean(contains(*pair) for pair in pairs),
        "empty": statistics.mean(not is_visible(text) for text, _ in pairs),
        "cut": statistics.mean(one.finish_reason == "length" for one, _ in said),
        "n_words": statistics.mean(len(text.split()) for text, _ in pairs),
        "seconds": elapsed_s / len(said),
    }


def table_line(row: dict[str, Any], *, first: bool) -> str:
    """A row of a Markdown table; the first one brings the head."""
    figures = " | ".join(f"{row[name]:.3f}" for name in ("f1", "em", "contains", "empty", "cut"))
    line = f"| {row['model']} | {row['form']} | {figures} | {row['n_words']:.1f} | {row['seconds']:.2f} |"
    head = "| model | form | F1 | EM | contains | empty | cut | words | seconds |\n| --- | --- " + "|---:" * 7 + "|\n"
    return head + line if first else line


if __name__ == "__main__":
    main()
