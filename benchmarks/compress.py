"""What compression costs, in prefills of the document and in memory, and what its caches cost at question time.

    python benchmarks/compress.py     # a table: `matched` and `reconstruction`, 1,024 tokens
    python benchmarks/compress.py --model qwen-0.5b --length 256 --length 1024 --json
    python benchmarks/compress.py --length 200 --batch 16    # on a GPU, which one passage does not fill

One line for each length and method: `model method n_tokens prefills peak_memory_ratio ttft_ratio decode_ratio`, and
with `--batch` also `batch_ratio`.

- `prefills`: time of compression over the time of one plain prefill of the same document, median of pairs.
- `peak_memory_ratio`: the process's highest memory while compressing, over that with `reconstruction`: GPU memory, or
  resident memory on Linux; null elsewhere.
- `ttft_ratio`, `decode_ratio`: time to the first token and time of each further token from the cache, over those from
  the same cache without its biases, medians of pairs; null for caches without biases.
- `batch_ratio`: time of `--batch` documents of this length one by one over their time as one batch (`compress_many`).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ttft import document_ids, paired, timed

from kv_memory import Backbone, Compressor
from kv_memory.generate import compose

QUESTION = "What does the text say about the way it works?"
N_NEW = 16
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-0.5b", help="built-in, a folder or a hub id (default: qwen-0.5b)")
    parser.add_argument("--method", action="append", help="a selector; repeatable (default: reconstruction, matched)")
    parser.add_argument("--length", type=int, action="append", help="document tokens; repeatable (default: 1024)")
    parser.add_argument("--keep-ratio", type=float, default=0.125, help="share of tokens kept (default: 0.125)")
    parser.add_argument("--rounds", type=int, default=3, help="paired runs, of which medians are taken (default: 3)")
    parser.add_argument("--batch", type=int, help="also compress this many documents as one batch")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args()
    backbone = Backbone.load(args.model)
    methods = args.method or ["reconstruction", "matched"]
    if not args.json:
        print(f"{'method':>15} {'tokens':>7} {'prefills':>9} {'memory':>7} {'TTFT':>6} {'decode':>7} {'batch':>6}")
    for n_tokens in args.length or [1024]:
        ids = document_ids(backbone, n_tokens)
        base = peak_of(backbone, lambda ids=ids: compress(backbone, "reconstruction", ids, args.keep_ratio))
        for method in methods:
            row = measure(backbone, method, ids, args, base)
            print(json.dumps(row) if args.json else line(row), flush=True)


def compress(backbone: Backbone, method: Any, ids: list[int], keep_ratio: float) -> Any:
    """One document."""
    return Compressor(backbone, selector=method).compress_ids(ids, keep_ratio=keep_ratio)


def measure(
    backbone: Backbone, method: str, ids: list[int], args: argparse.Namespace, base: float | None
) -> dict[str, Any]:
    """One line."""

    @torch.no_grad()
    def prefill() -> None:
        backbone.prefill(torch.tensor([ids]), backbone.prefixed_cache(len(ids)))
        wait(backbone)

    def work() -> None:
        compress(backbone, method, ids, args.keep_ratio)
        wait(backbone)

    prefill()
    peak = peak_of(backbone, work)
    times = paired(args.rounds, prefill=lambda: timed(prefill), work=lambda: timed(work))
    cache = compress(backbone, method, ids, args.keep_ratio)
    ratios: dict[str, float | None] = {"ttft_ratio": None, "decode_ratio": None}
    if cache.bias is not None:
        ratios = question_ratios(backbone, cache, max(5, args.rounds))
    return {
        "model": args.model,
        "method": method,
        "n_tokens": len(ids),
        "keep_ratio": args.keep_ratio,
        "prefills": statistics.median(w / p for w, p in zip(times["work"], times["prefill"], strict=True)),
        "peak_memory_ratio": None if peak is None or base is None else peak / base,
        **ratios,
        **({"batch_ratio": batch_ratio(backbone, method, len(ids), args)} if args.batch else {}),
    }


def batch_ratio(backbone: Backbone, method: Any, n_tokens: int, args: argparse.Namespace) -> float:
    """Documents of `n_tokens` one by one, over the same ones as a batch."""
    compressor = Compressor(backbone, selector=method)
    ids = document_ids(backbone, args.batch * n_tokens)
    texts = [backbone.tokenizer.decode(ids[start : start + n_tokens]) for start in range(0, len(ids), n_tokens)]

    def one_by_one() -> None:
        for text in texts:
            compressor.compress(text, keep_ratio=args.keep_ratio)
        wait(backbone)

    def together() -> None:
        compressor.compress_many(texts, keep_ratio=args.keep_ratio)
        wait(backbone)

    together()
    times = paired(args.rounds, apart=lambda: timed(one_by_one), together=lambda: timed(together))
    return statistics.median(a / b for a, b in zip(times["apart"], times["together"], strict=True))


@torch.no_grad()
def question_ratios(backbone: Backbone, cache: Any, rounds: int) -> dict[str, float | None]:
    """Asking the cache over asking it without its biases: the question, then `N_NEW` tokens one by one."""
    question = torch.tensor([backbone.encode_question(QUESTION)])
    token = question[:, :1]

    def ask(caches: list[Any]) -> tuple[float, float]:
        composed = []

        def first() -> None:
            composed.append(compose(backbone, caches, n_question=question.shape[1], n_new=N_NEW))
            backbone.logits(question, composed[0])
            wait(backbone)

        def others() -> None:
            for _ in range(N_NEW):
                backbone.logits(token, composed[0])
            wait(backbone)

        return timed(first), timed(others)

    plain = replace(cache, bias=None)
    ask([cache]), ask([plain])
    pairs = [(ask([cache]), ask([plain])) for _ in range(rounds)]
    first, others = zip(*((ours[0] / theirs[0], ours[1] / theirs[1]) for ours, theirs in pairs), strict=True)
    return {"ttft_ratio": statistics.median(first), "decode_ratio": statistics.median(others)}


def wait(backbone: Backbone) -> None:
    """A GPU works on after the call has returned."""
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


def peak_of(backbone: Backbone, work: Callable[[], Any]) -> float | None:
    """The highest memory while a piece of work runs, in bytes; None where it cannot be known."""
    gc.collect()
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(backbone.device)
        work()
        return float(torch.cuda.max_memory_allocated(backbone.device))
    if not RESET.exists():
        work()
        return None
    RESET.write_text("5")  # forget the peak so far
    work()
    peak = next(text for text in STATUS.read_text().splitlines() if text.startswith("VmHWM"))
    return float(peak.split()[1]) * 1024


def line(row: dict[str, Any]) -> str:
    """The same for people."""
    names = ("prefills", "peak_memory_ratio", "ttft_ratio", "decode_ratio", "batch_ratio")
    cells = [row.get(name) for name in names]
    shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
    aligned = " ".join(f"{cell:>{width}}" for cell, width in zip(shown, (9, 7, 6, 7, 6), strict=True))
    return f"{row['method']:>15} {row['n_tokens']:>7,} {aligned}"


if __name__ == "__main__":
    main()
