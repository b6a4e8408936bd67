"""A whole RAG application through LlamaIndex: distilled caches against the stock synthesizer with the text.

    python benchmarks/rag.py            # a table
    python benchmarks/rag.py --json     # one JSON object per top-k

The same questions over the same pages, the same retriever (BM25) and the same model, in the same prompt form: the
difference is that one engine passes the retrieved passages on as text (LlamaIndex's `compact`), and the other as
distilled caches. Both keep the shared prefix of the prompt prefilled. Every question is asked both ways, one right
after the other, in an order that alternates; times are medians over the questions, from `query()` to the first piece of
the answer and to its end, retrieval included. Compare their ratios; the seconds depend on the machine.

Pages are five neighbouring paragraphs of one article of SQuAD dev (its share in KV_MEMORY_DATA, or the Hugging Face
hub), with one question to each page. `--pages FOLDER --questions FILE` takes your own text or Markdown files, and
JSON lines of {question, answer}; without `answer` there is no F1.

    top_k                 passages retrieved
    ttft_cached_s         time to the first piece of the answer, from caches; `_text_s`: from text
    total_cached_s        time to the last piece
    prompt_tokens_cached  tokens prefilled for one question, a mean; the rest is read from caches
    agreement             F1 between the words of the two answers, a mean over the pairs that are not both empty
    agreement_none        the same between the answers from text and without any document: its floor; 1 is its ceiling
    both_empty            share of the pairs in which neither answer has a word; they are left out of the
                          agreement; `both_empty_none`: the same without any document
    empty_cached          share of the answers without a visible character; `_text`, `_none`
    f1_cached, f1_text    F1 of answers to references; text is the ceiling, f1_none (no document) the floor
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer

from kv_memory import Document, KVMemory
from kv_memory.config import ratio_of
from kv_memory.datasets import read_examples
from kv_memory.evaluate.metrics import f1, normalise
from kv_memory.integrations.llama_index import KVMemoryLLM, KVMemoryQueryEngine, KVMemoryStoreRetriever
from kv_memory.model.first_token import is_visible

PARAGRAPHS = 5  # of a page


@dataclass
class Asked:
    """What one way of asking took and gave, question by question."""

    ttft_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


class Usage(BaseEventHandler):
    """Tokens prefilled for the last reply: streaming responses do not hand its figures on."""

    prefilled: int = 0

    @classmethod
    def class_name(cls) -> str:
        """As LlamaIndex wants it."""
        return "Usage"

    def handle(self, event: Any, **_: Any) -> None:
        """Take the figures of a reply that has ended."""
        if isinstance(event, LLMChatEndEvent) and event.response is not None and event.response.raw:
            usage = event.response.raw["usage"]
            self.prefilled = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]


def main() -> None:
    """Make the store, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="qwen-0.5b", help="a built-in model, a folder or a hub id (default: qwen-0.5b)"
    )
    parser.add_argument("--keep-ratio", type=ratio_of, default=0.25, help="share of tokens kept (default: 0.25)")
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 3, 5], help="retrieved passages (default: 1 3 5)")
    parser.add_argument("--n-pages", type=int, default=60, help="pages of SQuAD (default: 60)")
    parser.add_argument("--n-questions", type=int, default=50, help="questions (default: 50)")
    parser.add_argument("--pages", type=Path, help="a folder of your own pages")
    parser.add_argument("--questions", type=Path, help="JSON lines of {question, answer}, for --pages")
    parser.add_argument("--max-tokens", type=int, default=32, help="longest answer (default: 32)")
    parser.add_argument("--store", type=Path, help="keep the store here, for the next run")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args()
    if (args.pages is None) != (args.questions is None):
        parser.error("--pages and --questions go together")
    pages, questions = own(args) if args.pages else squad(args.n_pages, args.n_questions)
    with contextlib.ExitStack() as stack:
        store = (
            args.store or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-memory-bench-"))) / "store"
        )
        memory = stack.enter_context(
            KVMemory.open(store, model=args.model, keep_ratio=args.keep_ratio, keep_text=True)  # to compare with it
        )
        report = memory.add(pages)
        print(
            f"{len(pages)} pages, {memory.stats().n_passages} passages, {len(questions)} questions; "
            f"compressed in {report.elapsed_s:.0f} s",
            file=sys.stderr,
        )
        none = ask_without(memory, questions, args.max_tokens)
        for index, top_k in enumerate(args.top_k):
            row = measure(memory, questions, none, top_k, args.max_tokens)
            print(json.dumps(row) if args.json else table_line(row, first=index == 0), flush=True)


def squad(n_pages: int, n_questions: int) -> tuple[list[Document], list[tuple[str, tuple[str, ...]]]]:
    """Pages of neighbouring paragraphs, from all articles in turn, and a question to each of the first pages."""
    articles = [list(group) for _, group in itertools.groupby(read_examples("squad", split="dev"), lambda e: e.title)]
    made: list[tuple[Document, list[Any]]] = []
    for place in range(max(map(len, articles)) // PARAGRAPHS):
        for article in articles:
            part = article[place * PARAGRAPHS : (place + 1) * PARAGRAPHS]
            if len(part) == PARAGRAPHS and len(made) < n_pages:
                text = "\n\n".join(example.context for example in part)
                page = Document(id=f"{part[0].title}#{place}", text=text)
                made.append((page, [question for example in part for question in example.questions]))
    draw = random.Random(0)
    chosen = [draw.choice(questions) for _, questions in made[:n_questions]]
    return [page for page, _ in made], [(question.text, question.answers) for question in chosen]


def own(args: argparse.Namespace) -> tuple[list[Path], list[tuple[str, tuple[str, ...]]]]:
    """A user's folder and questions."""
    lines = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    asked = [(line["question"], (line["answer"],) if line.get("answer") else ()) for line in lines]
    return [args.pages], asked[: args.n_questions]


def text_engine(memory: KVMemory, retriever: KVMemoryStoreRetriever, max_tokens: int) -> RetrieverQueryEngine:
    """LlamaIndex as it is, with the same model and prompt form."""
    form = memory.backbone.prompt

    def prompt(messages: Sequence[ChatMessage]) -> str:
        return form.prefix + str(messages[-1].content)

    llm = KVMemoryLLM(memory, max_tokens=max_tokens, messages_to_prompt=prompt)
    before, between, after = (
        part.replace("{", "{{").replace("}", "}}")
        for part in (form.document_before, form.document_after + form.question_before, form.question_after)
    )
    template = PromptTemplate(before + "{context_str}" + between + "{query_str}" + after)
    synthesizer = get_response_synthesizer(
        llm=llm, response_mode=ResponseMode.COMPACT, text_qa_template=template, streaming=True
    )
    return RetrieverQueryEngine(retriever, response_synthesizer=synthesizer)


def measure(
    memory: KVMemory, questions: Sequence[tuple[str, tuple[str, ...]]], none: Sequence[str], top_k: int, max_tokens: int
) -> dict[str, Any]:
    """One top-k: every question from caches and from text."""
    usage = Usage()
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(usage)
    retriever = KVMemoryStoreRetriever(memory, similarity_top_k=top_k)
    cached_engine = KVMemoryQueryEngine.from_defaults(
        retriever, llm=KVMemoryLLM(memory, max_tokens=max_tokens), streaming=True
    )
    engines = {"cached": cached_engine, "text": text_engine(memory, retriever, max_tokens)}
    asked = {name: Asked() for name in engines}
    for engine in engines.values():  # what the first question of a process pays for
        "".join(engine.query(questions[0][0]).response_gen)
    for index, (question, _) in enumerate(progress(questions, f"top-k {top_k}")):
        for name in sorted(engines, reverse=index % 2 == 1):
            ask(engines[name], question, usage, asked[name])
    dispatcher.event_handlers.remove(usage)
    cached, text = asked["cached"], asked["text"]
    references = [answers for _, answers in questions]
    agree, both_empty = agreement(cached.answers, text.answers)
    agree_none, both_empty_none = agreement(none, text.answers)
    return {
        "top_k": top_k,
        "ttft_cached_s": statistics.median(cached.ttft_s),
        "ttft_text_s": statistics.median(text.ttft_s),
        "total_cached_s": statistics.median(cached.total_s),
        "total_text_s": statistics.median(text.total_s),
        "prompt_tokens_cached": statistics.mean(cached.prompt_tokens),
        "prompt_tokens_text": statistics.mean(text.prompt_tokens),
        "agreement": agree,
        "agreement_none": agree_none,
        "both_empty": both_empty,
        "both_empty_none": both_empty_none,
        "empty_cached": empty_share(cached.answers),
        "empty_text": empty_share(text.answers),
        "empty_none": empty_share(none),
        "f1_cached": mean_f1(cached.answers, references),
        "f1_text": mean_f1(text.answers, references),
        "f1_none": mean_f1(none, references),
        "n_questions": len(questions),
        "keep_ratio": memory.settings.keep_ratio,
    }


def ask(engine: RetrieverQueryEngine, question: str, usage: Usage, asked: Asked) -> None:
    """Ask once, on the clock."""
    usage.prefilled = 0
    start_s, first_s, pieces = time.perf_counter(), None, []
    for piece in engine.query(question).response_gen:
        first_s = first_s or time.perf_counter() - start_s
        pieces.append(piece)
    total_s = time.perf_counter() - start_s
    assert usage.prefilled > 0, "the reply came without its figures"
    asked.ttft_s.append(first_s or total_s)
    asked.total_s.append(total_s)
    asked.prompt_tokens.append(usage.prefilled)
    asked.answers.append("".join(pieces).strip())


def ask_without(memory: KVMemory, questions: Sequence[tuple[str, tuple[str, ...]]], max_tokens: int) -> list[str]:
    """Answers without any document: what the model knows, or guesses."""
    llm = KVMemoryLLM(memory, max_tokens=max_tokens)
    return [llm.complete(question, kv_ids=[]).text for question, _ in progress(questions, "no document")]


def mean_f1(answers: Sequence[str], references: Sequence[tuple[str, ...]]) -> float | None:
    """Over the questions that have references; None where none has."""
    scores = [f1(answer, known) for answer, known in zip(answers, references, strict=True) if known]
    return statistics.mean(scores) if scores else None


def agreement(answers: Sequence[str], others: Sequence[str]) -> tuple[float | None, float]:
    """F1 between two answers to each question, a mean over the pairs with a word, and the share of the other pairs."""
    pairs = list(zip(answers, others, strict=True))
    scores = [f1(a, [b]) for a, b in pairs if normalise(a) or normalise(b)]
    return statistics.mean(scores) if scores else None, 1 - len(scores) / max(1, len(pairs))


def empty_share(answers: Sequence[str]) -> float:
    """Of answers in which nothing can be seen."""
    return statistics.mean(not is_visible(answer) for answer in answers)


def progress(questions: Sequence[tuple[str, tuple[str, ...]]], name: str) -> Any:
    """The questions, with a bar on standard error where somebody looks."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(questions, description=name, console=console, disable=not console.is_terminal)


def table_line(row: dict[str, Any], *, first: bool) -> str:
    """A row of a Markdown table; the first one brings the head."""
    score = (
        "none" if row["f1_text"] is None else f"{row['f1_cached']:.2f} / {row['f1_text']:.2f} / {row['f1_none']:.2f}"
    )
    agree = " / ".join("none" if row[name] is None else f"{row[name]:.2f}" for name in ("agreement", "agreement_none"))
    line = (
        f"| {row['top_k']} | {row['ttft_cached_s']:.3f} s | {row['ttft_text_s']:.3f} s "
        f"| {row['ttft_cached_s'] / row['ttft_text_s']:.3f} "
        f"| {row['total_cached_s']:.2f} s | {row['total_text_s']:.2f} s "
        f"| {row['total_cached_s'] / row['total_text_s']:.2f} "
        f"| {row['prompt_tokens_cached']:.0f} | {row['prompt_tokens_text']:.0f} "
        f"| {agree} | {row['both_empty']:.2f} | {score} |"
    )
    head = (
        "| top-k | first piece: caches | text | ratio | whole answer: caches | text | ratio | prompt tokens: caches "
        "| text | agreement / without a document | both empty | F1: caches / text / none |\n" + "|---:" * 12 + "|\n"
    )
    return head + line if first else line


if __name__ == "__main__":
    main()
