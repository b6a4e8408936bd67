"""Whether time and memory stay flat over a thousand questions: top-3 questions over many documents, shuffled.

    python benchmarks/steady.py                 # two minutes or so with smollm2
    python benchmarks/steady.py --questions 300

Documents are compressed with the fastest selector, since what is measured does not depend on it. Every question has
words of one document, chosen at random, and is answered with a few tokens from the three best ones: some from hot
caches, most from files. The first 20 questions warm up and do not count. Ratios: time of the last 100 questions over
that of the first 100, and resident memory after the last question over that after the first 100.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import re
import statistics
import tempfile
import time

from results import keep_rows

_WINDOW = 100


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model, a folder or a hub id (default: smollm2)")
    parser.add_argument("--questions", type=int, default=1000, help="number of questions (default: 1,000)")
    parser.add_argument("--documents", type=int, default=40, help="number of documents (default: 40)")
    args = parser.parse_args()
    from kv_memory import DecodeSettings, KVMemory

    texts = descriptions(args.documents)
    pick = random.Random(0)
    options = {"model": args.model, "selector": "sink_recent", "keep_ratio": 1 / 8}
    with tempfile.TemporaryDirectory(prefix="kv-memory-bench-") as folder, KVMemory.open(folder, **options) as memory:
        memory.add(texts)
        settings = DecodeSettings(max_new_tokens=4)
        times, resident = [], []
        for number in range(-20, args.questions):
            words = re.findall(r"[a-z]{5,}", pick.choice(texts).lower())
            question = f"What about {' and '.join(pick.sample(words, 3))}?"
            start_s = time.perf_counter()
            memory.ask(question, top_k=3, settings=settings)
            if number >= 0:
                times.append(time.perf_counter() - start_s)
                resident.append(resident_bytes())
        hot_bytes = memory.backbone.hot.size_bytes
    first, last = statistics.median(times[:_WINDOW]), statistics.median(times[-_WINDOW:])
    what = f"{args.questions:,} shuffled top-3 questions, last {_WINDOW} / first {_WINDOW}, {args.model}"
    keep_rows(
        "steady",
        [
            (f"{what}: time", sum(times[-_WINDOW:]) / sum(times[:_WINDOW]), "0.95 to 1.05"),
            (f"{what}: median time", last / first, "0.95 to 1.05"),
            (f"{what}: resident memory", resident[-1] / resident[_WINDOW - 1], "1"),
        ],
        first_s=first,
        last_s=last,
        hot_bytes=hot_bytes,
        resident_mb=[round(resident[i] / 1e6) for i in range(_WINDOW - 1, len(resident), _WINDOW)],
    )


def descriptions(number: int) -> list[str]:
    """Real prose: the beginnings of descriptions of installed packages."""
    found = []
    for name in sorted({dist.metadata["Name"] for dist in importlib.metadata.distributions()}, key=str.lower):
        text = importlib.metadata.metadata(name).get_payload()
        if isinstance(text, str) and len(text) > 1500:
            found.append(text[:1500])
    return found[:number]


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    main()
