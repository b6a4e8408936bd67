"""Time to the first token: from a distilled cache on disk, from the text, and with no document at all.

    python benchmarks/ttft.py            # a table
    python benchmarks/ttft.py --json     # one JSON object per document length
    python benchmarks/ttft.py --goals --lengths 4096    # the ratios against their goals, kept in results/

For every length a separate process makes the cache, and several new processes ask questions. Each has loaded the model
and answered a question without a document (so that no page of weights is loaded during the measurement), but has never
seen the store, and the store's files have been dropped from the operating system's page cache where it allows that
(Linux). The figure from a cache is the first such question: catalog, bytes from disk, verification of their SHA-256,
composing, prefill. The hot figure is from further questions about the document, whose composed cache is then in memory
(see `KVMemory.open`), with the store asked each time as always. The other ways follow in the same process, seconds
apart. Reported are medians over the processes; compare their ratios, the seconds depend on the machine.

The compressor is the adapter: the shipped one for smollm2, for others one of the same form without training,
which takes the same time. `--selector` times a training-free selector instead.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import keep_rows

from kv_memory.config import ratio_of

LENGTHS = (512, 1024, 2048, 4096)
QUESTION = "What does the text say about the way it works?"


def main() -> None:
    """Run the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a built-in model, a folder or a hub id (default: smollm2)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="document lengths, in tokens")
    parser.add_argument("--keep-ratio", type=ratio_of, default=0.125, help="share of tokens kept (default: 0.125)")
    parser.add_argument(
        "--selector", choices=["reconstruction", "attention", "sink_recent"], help="use this instead of the adapter"
    )
    parser.add_argument("--processes", type=int, default=3, help="new processes that ask the questions (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--goals", action="store_true", help="ratios against their goals, one JSON object a row")
    parser.add_argument("--role", choices=["make", "ask"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        json.dump({"make": make, "ask": ask}[args.role](args), sys.stdout)
        return
    for n_tokens in args.lengths:
        row = measure(args, n_tokens)
        if args.goals:
            keep_rows(f"ttft-{args.model.replace('/', '-')}-{n_tokens}", goals(args, row), **row)
            continue
        print(json.dumps(row) if args.json else table_line(row, first=n_tokens == args.lengths[0]), flush=True)


def goals(args: argparse.Namespace, row: dict[str, Any]) -> list[tuple[str, float, str]]:
    """The ratios that issue SERVED names."""
    what = f"first token, {row['n_tokens']:,} tokens at 1/{1 / args.keep_ratio:.0f}, {args.model}"
    cold = "<= 1.15" if args.model == "qwen-0.5b" else "<= 1.4"
    return [
        (f"{what}, file not yet read / no document", row["ttft_cached_s"] / row["ttft_floor_s"], cold),
        (f"{what}, cache hot / no document", row["ttft_hot_s"] / row["ttft_floor_s"], "<= 1.1"),
        (f"{what}, file not yet read / text prefill", row["ttft_cached_s"] / row["ttft_text_s"], "<= 0.009"),
    ]


def measure(args: argparse.Namespace, n_tokens: int) -> dict[str, Any]:
    """One document length, in two fresh processes."""
    with tempfile.TemporaryDirectory(prefix="kv-memory-bench-") as folder:
        made = in_fresh_process(args, "make", folder, n_tokens)
        asked = []
        for _ in range(args.processes):
            forget_files(Path(folder) / "store")
            asked.append(in_fresh_process(args, "ask", folder, n_tokens))
    times = {name: statistics.median(run[name] for run in asked) for name in asked[0]}
    return {"n_tokens": made.pop("n_tokens"), "keep_ratio": args.keep_ratio, **times, **made}


def forget_files(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that reading them reads the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_fresh_process(args: argparse.Namespace, role: str, folder: str, n_tokens: int) -> dict[str, Any]:
    """Run one role and read its JSON."""
    command = [sys.executable, __file__, "--role", role, "--folder", folder, "--lengths", str(n_tokens)]
    command += ["--model", args.model, "--keep-ratio", str(args.keep_ratio)]
    command += ["--selector", args.selector] if args.selector else []
    env = {**os.environ, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def document_ids(backbone: Any, n_tokens: int) -> list[int]:
    """Real prose: descriptions of installed packages, as many as it takes."""
    ids: list[int] = []
    for name in sorted({dist.metadata["Name"] for dist in importlib.metadata.distributions()}, key=str.lower):
        payload = importlib.metadata.metadata(name).get_payload()
        if isinstance(payload, str) and len(payload) > 1000:
            ids += backbone.encode(payload)
        if len(ids) >= n_tokens:
            return ids[:n_tokens]
    raise SystemExit(f"the installed packages' descriptions hold {len(ids)} tokens, {n_tokens} are needed")


def paired(rounds: int, **ways: Callable[[], float]) -> dict[str, list[float]]:
    """Take each way in turn, `rounds` times; seconds per way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way())
    return times


def timed(work: Callable[[], Any]) -> float:
    """Seconds one call takes."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def make(args: argparse.Namespace) -> dict[str, Any]:
    """Compress one document against one plain prefill of it, and store its cache."""
    import torch

    from kv_memory import Backbone, Compressor, Store
    from kv_memory.compress import Adapter
    from kv_memory.model.embedded import SHIPPED, adapter_folder
    from kv_memory.train import TrainSettings, new_adapter

    backbone = Backbone.load(args.model)
    if args.selector:
        compressor = Compressor(backbone, selector=args.selector)
    else:
        if args.model == "smollm2":
            adapter = Adapter.load(adapter_folder(SHIPPED), backbone)
        else:  # of the same form, untrained: that costs the same
            adapter = new_adapter(backbone, TrainSettings())
        adapter.save(args.folder / "adapter")
        compressor = Compressor(backbone, adapter=adapter)
    ids = document_ids(backbone, args.lengths[0])

    @torch.no_grad()
    def prefill() -> None:
        backbone.prefill(torch.tensor([ids]), backbone.prefixed_cache(len(ids)))

    prefill()
    times = paired(
        3,
        prefill=lambda: timed(prefill),
        compress=lambda: timed(lambda: compressor.compress_ids(ids, keep_ratio=args.keep_ratio)),
    )
    cache = compressor.compress_ids(ids, keep_ratio=args.keep_ratio)
    with Store.open(args.folder / "store") as store:
        info = store.put("0" * 64, cache)
    (args.folder / "ids.json").write_text(json.dumps(ids))
    return {
        "n_tokens": len(ids),
        "compress_s": statistics.median(times["compress"]),
        "prefill_s": statistics.median(times["prefill"]),
        "size_bytes": info.size_bytes,
        "theory_bytes": cache.theory_bytes,
    }


def ask(args: argparse.Namespace) -> dict[str, Any]:
    """Time to first token from disk, from the text, and without a document; the first round is the cold one."""
    from kv_memory import Backbone, Compressor, DecodeSettings, Generator, Store
    from kv_memory.compress import Adapter
    from kv_memory.lazy_compressor import default_hot_size_bytes

    backbone = Backbone.load(args.model)
    if args.selector:
        compressor = Compressor(backbone, selector=args.selector)
    else:
        compressor = Compressor(backbone, adapter=Adapter.load(args.folder / "adapter", backbone))
    fingerprint = compressor.fingerprint()
    generator = Generator(backbone)
    one = DecodeSettings(max_new_tokens=1)
    text = backbone.tokenizer.decode(json.loads((args.folder / "ids.json").read_text()))
    generator.generate(QUESTION, settings=one)

    with Store.open(args.folder / "store", create=False) as store:
        store.warm()  # as KVMemory does while it loads the model

        def from_cache() -> float:
            start_s = time.perf_counter()
            cache = store.get("0" * 64, fingerprint, args.keep_ratio)
            return time.perf_counter() - start_s + generator.generate(QUESTION, [cache], settings=one).ttft_s

        def from_text() -> float:
            return generator.stream(QUESTION, texts=[text], settings=one).answer.ttft_s

        def from_nothing() -> float:
            return generator.generate(QUESTION, settings=one).ttft_s

        cached_s = from_cache()
        time.sleep(0.1)  # a file is hashed again until it has been at rest for a moment
        backbone.hot.limit(default_hot_size_bytes())
        from_cache()
        # In turn, so that both see the same machine.
        after = paired(9, hot=from_cache, floor=from_nothing)
        floor_s, hot_s = statistics.median(after["floor"]), statistics.median(after["hot"])
        backbone.hot.limit(0)
        text_s = statistics.median(from_text() for _ in range(2))
    return {"ttft_cached_s": cached_s, "ttft_hot_s": hot_s, "ttft_text_s": text_s, "ttft_floor_s": floor_s}


def table_line(row: dict[str, Any], *, first: bool) -> str:
    """The same for people."""
    head = (
        f"{'tokens':>7} {'TTFT: cached':>13} {'text':>8} {'none':>8} {'cached/text':>12} {'cached/none':>12} "
        f"{'compress/prefill':>17} {'MB on disk':>11} {'of theory':>10}\n"
    )
    return (head if first else "") + (
        f"{row['n_tokens']:>7,} {row['ttft_cached_s']:>11.3f} s {row['ttft_text_s']:>6.2f} s "
        f"{row['ttft_floor_s']:>6.3f} s {row['ttft_cached_s'] / row['ttft_text_s']:>12.3f} "
        f"{row['ttft_cached_s'] / row['ttft_floor_s']:>12.2f} {row['compress_s'] / row['prefill_s']:>17.2f} "
        f"{row['size_bytes'] / 1e6:>11.2f} {row['size_bytes'] / row['theory_bytes']:>10.3f}"
    )


if __name__ == "__main__":
    main()
