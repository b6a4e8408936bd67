"""How often the right passage is found: recall@1, 3 and 5 of each retriever on questions with a known passage.

    python benchmarks/retrieval.py --nats nats_docs.tar.gz                # the table of docs/retrieval.md
    python benchmarks/retrieval.py --retriever bm25 --questions 200       # quicker

Two sets. SQuAD: a paragraph of one article is to be found among all paragraphs of the dev half (KV_MEMORY_DATA, or
from the hub). NATS: 59 questions, written by hand before anything was measured, whose answer is in a passage of the
NATS documentation, split as `add` does; any passage with the question's evidence counts as right.

No model is loaded but the tokenizer of `smollm2`, which measures passages, and the encoder.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from kv_memory.config import RetrieverName
from kv_memory.datasets import read_examples
from kv_memory.documents import Document, read_documents
from kv_memory.ingest.document_records import prepare, with_vectors
from kv_memory.model.embedded import BUILT_IN, prepared_folder
from kv_memory.retrieval.encoder import Encoder
from kv_memory.retrieval.minilm import built_in_encoder
from kv_memory.retrieval.retriever import Hit, Retriever
from kv_memory.store import Store

QUESTIONS = Path(__file__).with_name("nats_questions.jsonl")
LARGEST = 5  # k of recall@k


class Asked(NamedTuple):
    """A question, and the passages (document id, ordinal) that answer it."""

    question: str
    right: set[tuple[str, int]]


def main() -> None:
    """Fill a store with each set, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nats", type=Path, help="tar archive or folder of the NATS documentation; none leaves it out")
    parser.add_argument(
        "--passage-tokens", type=int, nargs="+", default=[256, 1024], help="for NATS (default: 256 1024)"
    )
    parser.add_argument("--questions", type=int, default=1900, help="fewest of SQuAD (default: 1900)")
    parser.add_argument(
        "--retriever",
        nargs="+",
        choices=get_args(RetrieverName),
        default=get_args(RetrieverName),
        help="(default: all)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    args = parser.parse_args()
    encoder = None if set(args.retriever) == {"bm25"} else built_in_encoder("minilm")
    with tempfile.TemporaryDirectory(prefix="kv-memory-bench-") as scratch:
        sets = [("SQuAD", *squad(args.questions), None)]
        if args.nats is not None:
            folder = unpacked(args.nats, Path(scratch))
            sets += [(f"NATS, {n} tokens", read_documents(folder).documents, None, n) for n in args.passage_tokens]
        for number, (name, documents, asked, limit) in enumerate(sets):
            with Store.open(Path(scratch) / f"store-{number}") as store:
                fill(store, documents, limit, encoder)
                for row in measure(store, asked or nats(store), args.retriever, encoder):
                    print(json.dumps({"set": name} | row) if args.json else line(name, row), flush=True)


def squad(n_questions: int) -> tuple[list[Document], list[Asked]]:
    """The paragraphs as documents of one passage with the title of their article, and questions spread over them."""
    documents: list[Document] = []
    asked: list[Asked] = []
    for number, example in enumerate(read_examples("squad", split="dev")):
        id_ = f"{number:05}"
        metadata = {"title": example.title.replace("_", " ")} if example.title else {}
        documents.append(Document(id=id_, text=example.context, metadata=metadata))
        asked += [Asked(question.text, {(id_, 0)}) for question in example.questions]
    return documents, asked[:: max(1, len(asked) // n_questions)]


def unpacked(path: Path, scratch: Path) -> Path:
    """The folder of an archive."""
    if path.is_dir():
        return path
    with tarfile.open(path) as archive:
        archive.extractall(scratch / "nats", filter="data")
    return scratch / "nats"


def nats(store: Store) -> list[Asked]:
    """The questions with the passages that contain their evidence."""
    lines = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    passages = [(" ".join((p.text or "").split()), (p.document_id, p.ordinal)) for p in store.passages()]
    asked = [
        Asked(line["question"], {place for text, place in passages if " ".join(line["evidence"].split()) in text})
        for line in lines
    ]
    return [each for each in asked if each.right]  # without those whose evidence a split has cut


def fill(store: Store, documents: Any, limit: int | None, encoder: Encoder | None) -> None:
    """Store the documents with their texts and vectors, and without caches."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared_folder(BUILT_IN["smollm2"]))

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    for document in documents:
        made = prepare(document, limit, count, keep_text=True, language="auto")
        store.put_document(with_vectors(made.record, made.texts, encoder))


def measure(
    store: Store, asked: list[Asked], names: Sequence[RetrieverName], encoder: Encoder | None
) -> Iterator[dict[str, Any]]:
    """The recall of each retriever."""
    retriever, n_passages = Retriever(store), len(store.passages())
    ways: dict[str, Callable[..., list[Hit]]] = {
        name: partial(retriever.retrieve, top_k=LARGEST, retriever=name, encoder=encoder) for name in names
    }
    if "hybrid" in names:
        ways["hybrid by ranks"] = partial(by_ranks, retriever, encoder)
    for name, retrieve in ways.items():
        retrieve("")  # loads or builds the index
        started = time.perf_counter()
        ranks = [rank(retrieve(each.question), each) for each in asked]
        elapsed_s = time.perf_counter() - started
        yield {
            "retriever": name,
            "n_passages": n_passages,
            "n_questions": len(asked),
            **{f"recall@{k}": sum(rank < k for rank in ranks) / len(ranks) for k in (1, 3, LARGEST)},
            "ms_per_question": 1000 * elapsed_s / len(asked),
        }


def by_ranks(retriever: Retriever, encoder: Encoder, question: str, k: int = 60) -> list[Hit]:
    """Reciprocal rank fusion of the best 50 of `bm25` and of `embedding`, which `hybrid` is compared with."""
    scores: dict[tuple[str, int], float] = defaultdict(float)
    hits: dict[tuple[str, int], Hit] = {}
    for name in ("bm25", "embedding"):
        for rank, hit in enumerate(retriever.retrieve(question, top_k=50, retriever=name, encoder=encoder), start=1):
            place = hit.document_id, hit.ordinal
            hits[place] = hit
            scores[place] += 1 / (k + rank)
    return [hits[place] for place in sorted(scores, key=lambda place: -scores[place])[:LARGEST]]


def rank(found: list[Hit], asked: Asked) -> int:
    """The rank of the first right passage, from 0."""
    hits = [(hit.document_id, hit.ordinal) for hit in found]
    return next((rank for rank, place in enumerate(hits) if place in asked.right), LARGEST)


def line(name: str, row: dict[str, Any]) -> str:
    """A row of a Markdown table."""
    shares = " | ".join(f"{row[f'recall@{k}']:.3f}" for k in (1, 3, LARGEST))
    counts = f"{row['n_passages']:,} | {row['n_questions']:,}"
    return f"| {name} | {row['retriever']} | {counts} | {shares} | {row['ms_per_question']:.1f} |"


if __name__ == "__main__":
    main()
