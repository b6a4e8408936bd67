"""Questions asked at once against the same questions one by one: tokens a second, total time, time to first token.

    python benchmarks/batching.py                      # the ratios against their goals, kept in results/
    python benchmarks/batching.py --model qwen-0.5b --paths together --folder /tmp/store    # the store is used again

Every question is about a document of its own. Answers are decoded greedily to the same length, whatever their text is:
end tokens and stop strings end none, so that both ways decode the same number of tokens. The two ways take turns; each
ratio is the median of the rounds' own ratios.

- `together`: tokens a second of all questions asked by as many threads, ÷ those of asking one after the other.
- `concurrent_calls`: total time of 20 concurrent `aask`, ÷ 20 in a row, with retrieval; answers end by themselves.
- `first_token_beside_others`: median time to first token of questions asked at once, ÷ that of one alone.
- `first_token_queued`: the same where 4 are decoded at a time, and the others wait.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from results import keep_rows

from kv_memory import DecodeSettings, KVMemory
from kv_memory.config import ratio_of
from kv_memory.generate import Answer, Turn
from kv_memory.query import Reference, key_of

QUESTION = "What does the text say about the way it works?"
N_CALLS = 20


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model, a folder or a hub id (default: smollm2)")
    parser.add_argument("--questions", type=int, default=16, help="questions asked at once (default: 16)")
    parser.add_argument("--tokens", type=int, default=512, help="length of a document, in tokens (default: 512)")
    parser.add_argument("--new-tokens", type=int, default=64, help="length of an answer, in tokens (default: 64)")
    parser.add_argument("--keep-ratio", type=ratio_of, default=0.125, help="share of tokens kept (default: 0.125)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both ways (default: 3)")
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS, help="what to measure (default: all)")
    parser.add_argument("--folder", type=Path, help="folder of a store to make, or to use again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() if args.folder is None else nullcontext(args.folder) as folder:
        texts = make(args, Path(folder) / args.model)
        measured = {name: PATHS[name](args, Path(folder) / args.model, texts) for name in args.paths}
    rows = [(f"{name}, {args.model}", one.pop("ratio"), one.pop("goal")) for name, one in measured.items()]
    details = {f"{name}_{key}": value for name, one in measured.items() for key, value in one.items()}
    keep_rows(f"batching-{args.model.replace('/', '-')}", rows, **details)


def make(args: argparse.Namespace, folder: Path) -> list[str]:
    """Compress the documents, unless an earlier run has; their texts."""
    with opened(args, folder) as memory:
        texts = documents(memory.backbone, args.questions, args.tokens)
        for index, text in enumerate(texts):
            memory.add_passages(f"document {index}", [text])
    return texts


def opened(args: argparse.Namespace, folder: Path, **options: Any) -> KVMemory:
    """The memory of the documents; none of its answers ends before its length."""
    memory = KVMemory.open(folder, model=args.model, keep_ratio=args.keep_ratio, **options)
    memory.backbone.prompt = replace(memory.backbone.prompt, stop=())
    memory.backbone.__dict__["end_ids"] = frozenset()
    return memory


def documents(backbone: Any, n: int, n_tokens: int) -> list[str]:
    """Real prose: the beginnings of descriptions of installed packages."""
    texts: list[str] = []
    for name in sorted({dist.metadata["Name"] for dist in importlib.metadata.distributions()}, key=str.lower):
        payload = importlib.metadata.metadata(name).get_payload()
        ids = backbone.encode(payload) if isinstance(payload, str) else []
        if len(ids) >= n_tokens:
            texts.append(backbone.tokenizer.decode(ids[:n_tokens]))
        if len(texts) == n:
            return texts
    raise SystemExit(f"{len(texts)} installed packages have a description of {n_tokens} tokens, {n} are needed")


def ask(memory: KVMemory, text: str, n_new: int) -> Answer:
    """Answer the question from one document."""
    settings = DecodeSettings(max_new_tokens=n_new)
    return memory.reader.reply([Turn("user", QUESTION)], [Reference(key=key_of(text))], settings=settings).answer


def one_by_one(memory: KVMemory, texts: list[str], n_new: int) -> list[Answer]:
    """Ask about each document when the answer before is complete."""
    return [ask(memory, text, n_new) for text in texts]


def at_once(memory: KVMemory, texts: list[str], n_new: int) -> list[Answer]:
    """Ask about all documents, each in a thread of its own."""
    found: dict[int, Answer] = {}
    threads = [
        threading.Thread(target=lambda i=index, t=text: found.update({i: ask(memory, t, n_new)}))
        for index, text in enumerate(texts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[index] for index in range(len(texts))]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds one call takes, and its result."""
    start_s = time.perf_counter()
    result = work()
    return time.perf_counter() - start_s, result


def together(args: argparse.Namespace, folder: Path, texts: list[str]) -> dict[str, Any]:
    """Tokens a second."""
    with opened(args, folder) as memory:
        at_once(memory, texts, 2)
        rounds = []
        for _ in range(args.rounds):
            alone_s, alone = timed(lambda: one_by_one(memory, texts, args.new_tokens))
            both_s, both = timed(lambda: at_once(memory, texts, args.new_tokens))
            n_alone, n_both = (sum(answer.n_new_tokens for answer in answers) for answers in (alone, both))
            rounds.append((n_alone / alone_s, n_both / both_s))
    equal = sum(a.token_ids == b.token_ids for a, b in zip(alone, both, strict=True))
    return {
        "ratio": round(statistics.median(both / alone for alone, both in rounds), 2),
        "goal": ">= 4",
        "one_by_one_tokens_per_s": round(statistics.median(alone for alone, _ in rounds), 1),
        "at_once_tokens_per_s": round(statistics.median(both for _, both in rounds), 1),
        "same_answers": f"{equal}/{len(texts)}",
    }


def concurrent_calls(args: argparse.Namespace, folder: Path, texts: list[str]) -> dict[str, Any]:
    """Total time of calls that retrieve their documents."""
    settings = DecodeSettings(max_new_tokens=args.new_tokens)
    asked = [" ".join(texts[index % len(texts)].split()[:12]) + "?" for index in range(N_CALLS)]
    with opened(args, folder) as memory:
        del memory.backbone.__dict__["end_ids"]

        async def gathered() -> list[Answer]:
            return await asyncio.gather(*(memory.aask(question, settings=settings) for question in asked))

        asyncio.run(gathered())
        rounds = []
        for _ in range(args.rounds):
            row_s, _ = timed(lambda: [memory.ask(question, settings=settings) for question in asked])
            both_s, _ = timed(lambda: asyncio.run(gathered()))
            rounds.append((row_s, both_s))
    return {
        "ratio": round(statistics.median(both / row for row, both in rounds), 3),
        "goal": "<= 0.4",
        "in_a_row_s": round(statistics.median(row for row, _ in rounds), 2),
        "at_once_s": round(statistics.median(both for _, both in rounds), 2),
    }


def first_token(args: argparse.Namespace, folder: Path, texts: list[str], **options: Any) -> dict[str, Any]:
    """Time to first token."""
    with opened(args, folder, **options) as memory:
        at_once(memory, texts, 2)
        rounds = []
        for _ in range(args.rounds):
            alone = [answer.ttft_s for answer in one_by_one(memory, texts, 1)]
            both = [answer.ttft_s for answer in at_once(memory, texts, args.new_tokens)]
            rounds.append((statistics.median(alone), statistics.median(both), max(both)))
    return {
        "ratio": round(statistics.median(both / alone for alone, both, _ in rounds), 2),
        "goal": "-",
        "alone_s": round(statistics.median(alone for alone, _, _ in rounds), 4),
        "at_once_s": round(statistics.median(both for _, both, _ in rounds), 4),
        "last_s": round(statistics.median(last for _, _, last in rounds), 4),
    }


PATHS: dict[str, Callable[..., dict[str, Any]]] = {
    "together": together,
    "concurrent_calls": concurrent_calls,
    "first_token_beside_others": first_token,
    "first_token_queued": lambda *args: first_token(*args, max_batch=4),
}

if __name__ == "__main__":
    main()
