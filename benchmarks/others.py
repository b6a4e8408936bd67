"""Distilled caches beside what people would use instead: same documents, same questions, same model, same prompts.

    python benchmarks/others.py --folder runs/others --way make
    python benchmarks/others.py --folder runs/others --llama-python VENV/bin/python --gguf FILE
    python benchmarks/others.py --folder runs/others --report

Documents are pages of five neighbouring paragraphs of SQuAD dev, each with a question. `make` compresses them. A way is
measured in a process of its own, or with `--way` alone, so that each can be timed on an idle machine; rows are kept in
the folder, and a way that is measured again replaces its row. `--report` prints the rows that the folder has.

    text              the page as text behind the prefilled shared prefix
    bm25_text         the three passages that BM25 finds among all paragraphs, as text; the only way that searches
    full_cache        Transformers: the page's DynamicCache, prefilled once and saved in safetensors, and `generate`
    llama_text        llama.cpp with the GGUF file that the model came from: the page as text
    llama_state       llama.cpp: the page's state, prefilled once and saved with `llama_state_seq_save_file`
    kv_memory_cold    a distilled cache whose file is not in the page cache and was never verified
    kv_memory_hot     the same again

`--weights int8` measures text, bm25_text and kv_memory with int8 weights; their rows end in `_int8`. llama.cpp needs
`llama-cpp-python` in an environment of its own, named by `--llama-python`; without it its ways are skipped.

Times are medians over the questions; of the others, only the ratios carry over to another machine.

    ttft_s, total_s   from the question to its first token, and to the end of its answer, loading included
    make_s            seconds a document before its first question
    size_bytes        on disk, a document
    f1                of the answers, against the references
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PARAGRAPHS, MAX_TOKENS = 5, 32
WAYS = ("text", "bm25_text", "full_cache", "llama_text", "llama_state", "kv_memory")
Answered = tuple[float, float, list[int]]  # seconds to the first token and to the last, token ids


def main() -> None:
    """Measure all ways or one, or print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder of documents, caches and rows")
    parser.add_argument("--way", choices=["make", *WAYS], help="measure only this (default: all)")
    parser.add_argument("--model", default="qwen-0.5b", help="a built-in model (default: qwen-0.5b)")
    parser.add_argument("--weights", default="plain", help="plain or int8 (default: plain)")
    parser.add_argument("--n-documents", type=int, default=12, help="pages, each with a question (default: 12)")
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="share of tokens kept (default: 0.25)")
    parser.add_argument("--llama-python", type=Path, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="GGUF file of the model")
    parser.add_argument("--threads", type=int, default=2, help="threads of llama.cpp (default: 2)")
    parser.add_argument("--report", action="store_true", help="print the folder's rows as tables")
    args = parser.parse_args()
    if args.report:
        report(args.folder)
    elif args.way is None:
        for way in ("make", *WAYS):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way], check=True)
    elif args.way == "make":
        make(args)
    elif args.way.startswith("llama"):
        llama(args)
    else:
        ours(args)


# -- documents, and what is made of them -------------------------------------------------------------------------------


def make(args: argparse.Namespace) -> None:
    """Write the documents, their token ids and their distilled caches; a page takes seconds, and is made once."""
    import torch

    from kv_memory import Backbone, Compressor, Document, KVMemory, Store
    from kv_memory.datasets import read_examples

    args.folder.mkdir(parents=True, exist_ok=True)
    articles = [list(group) for _, group in itertools.groupby(read_examples("squad", split="dev"), lambda e: e.title)]
    draw = random.Random(0)
    parts = [article[:PARAGRAPHS] for article in articles[: args.n_documents]]
    asked = [draw.choice([question for example in part for question in example.questions]) for part in parts]
    backbone = Backbone.load(args.model)
    pages = [
        {
            "text": "\n\n".join(example.context for example in part),
            "document": backbone.encode_document("\n\n".join(example.context for example in part)),
            "text_question": question.text,
            "question": backbone.encode_question(question.text),
            "answers": list(question.answers),
        }
        for part, question in zip(parts, asked, strict=True)
    ]
    work = {"prefix": list(backbone.prefix_ids), "end_ids": sorted(backbone.end_ids), "pages": pages}
    (args.folder / "work.json").write_text(json.dumps(work))
    compressor = Compressor(backbone)
    with Store.open(args.folder / "store") as store, torch.no_grad():
        for index, page in enumerate(pages):
            if store.has(key(index), compressor.fingerprint(), args.keep_ratio):
                continue
            ids = page["document"]
            prefill_s, _ = timed(
                lambda ids=ids: backbone.prefill(torch.tensor([ids]), backbone.prefixed_cache(len(ids)))
            )
            make_s, cache = timed(lambda ids=ids: compressor.compress_ids(ids, keep_ratio=args.keep_ratio))
            size = store.put(key(index), cache).size_bytes
            made = {"n_tokens": len(ids), "prefill_s": prefill_s, "make_s": make_s, "size_bytes": size}
            with open(args.folder / "made.jsonl", "a") as file:
                file.write(json.dumps(made) + "\n")
    with KVMemory.open(
        args.folder / "passages", model=backbone, selector="sink_recent", keep_ratio=1 / 16, keep_text=True
    ) as memory:  # for its search and its texts
        memory.add(
            Document(id=f"{part[0].title}#{i}", text=example.context)
            for part in parts
            for i, example in enumerate(part)
        )


def key(index: int) -> str:
    """Key of a page's cache."""
    return f"{index:064x}"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and its result."""
    start_s = time.perf_counter()
    result = work()
    return time.perf_counter() - start_s, result


# -- the ways in this process ------------------------------------------------------------------------------------------


def ours(args: argparse.Namespace) -> None:
    """A way with this package's model."""
    from kv_memory import Backbone

    work = json.loads((args.folder / "work.json").read_text())
    backbone = Backbone.load(args.model, weights=args.weights)
    tokenizer, suffix = backbone.tokenizer, "" if args.weights == "plain" else f"_{args.weights}"
    if args.way == "full_cache":
        rows = {"full_cache": full_cache(args, work)}
    elif args.way == "kv_memory":
        rows = {f"kv_memory_{heat}{suffix}": row for heat, row in from_caches(args, work, backbone).items()}
    else:
        rows = {f"{args.way}{suffix}": from_text(args, work, backbone)}
    for name, (answered, made) in rows.items():
        save(args.folder, name, work, answered, made, tokenizer)


def from_text(args: argparse.Namespace, work: Any, backbone: Any) -> tuple[list[Answered], dict[str, float]]:
    """The page, or what BM25 finds, as text."""
    from kv_memory import DecodeSettings, Generator, KVMemory

    generator, settings = Generator(backbone), DecodeSettings(max_new_tokens=MAX_TOKENS)
    answered: list[Answered] = []
    size = statistics.mean(len(page["text"].encode()) for page in work["pages"])

    def start(question: str, texts: Sequence[str]) -> Any:
        (answer,) = generator.start([question], texts=texts, settings=settings).decode()
        return answer

    with KVMemory.open(args.folder / "passages", model=backbone, create=False) as memory:
        start("What?", ["One."])
        for page in work["pages"]:
            begin_s, texts = time.perf_counter(), [page["text"]]
            if args.way == "bm25_text":
                hits = memory.retrieve(page["text_question"], top_k=3)
                texts = [memory.document(hit.document_id).passages[hit.ordinal].text or "" for hit in hits]
            search_s = time.perf_counter() - begin_s
            answer = start(page["text_question"], texts)
            answered.append((search_s + answer.ttft_s, search_s + answer.total_s, list(answer.token_ids)))
    return answered, {"make_s": 0.0, "size_bytes": size}


def from_caches(
    args: argparse.Namespace, work: Any, backbone: Any
) -> dict[str, tuple[list[Answered], dict[str, float]]]:
    """Distilled caches, each asked twice: from a file that was never seen, and again."""
    from kv_memory import Compressor, DecodeSettings, Generator, Store

    fingerprint, settings = Compressor(backbone).fingerprint(), DecodeSettings(max_new_tokens=MAX_TOKENS)
    generator = Generator(backbone)
    generator.generate("What?", settings=settings)
    for path in (args.folder / "store").rglob("*"):
        if path.is_file():
            forget(path)
    found: dict[str, list[Answered]] = {"cold": [], "hot": []}
    with Store.open(args.folder / "store", create=False) as store:
        store.warm()
        for (index, page), heat in itertools.product(enumerate(work["pages"]), ("cold", "hot")):
            begin_s = time.perf_counter()
            cache = store.get(key(index), fingerprint, args.keep_ratio)
            load_s = time.perf_counter() - begin_s
            answer = generator.generate(page["text_question"], [cache], settings=settings)
            found[heat].append((load_s + answer.ttft_s, load_s + answer.total_s, list(answer.token_ids)))
    made = [json.loads(line) for line in (args.folder / "made.jsonl").read_text().splitlines()]
    means = {name: statistics.mean(one[name] for one in made) for name in ("make_s", "size_bytes")}
    means["make_prefills"] = statistics.median(one["make_s"] / one["prefill_s"] for one in made)
    return {heat: (answered, means) for heat, answered in found.items()}


def full_cache(args: argparse.Namespace, work: Any) -> tuple[list[Answered], dict[str, float]]:
    """Transformers as it is: its own attention, cache and `generate`."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.generation.streamers import BaseStreamer

    from kv_memory.model.embedded import built_in, prepared_folder

    found = built_in(args.model)
    assert found is not None, "only built-in models"
    model = AutoModelForCausalLM.from_pretrained(prepared_folder(found), dtype=torch.bfloat16).eval()

    class Clock(BaseStreamer):  # type: ignore[misc]
        """Times of the tokens; the first call brings the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    answered, make_s, sizes = [], [], []
    with torch.no_grad():
        for index, page in enumerate(work["pages"]):
            ids, path = [*work["prefix"], *page["document"]], args.folder / f"full-{index}.safetensors"
            begin_s = time.perf_counter()
            cache = DynamicCache()
            model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
            layers = cache.layers
            save_file({f"{i}.{n}": getattr(at, n) for i, at in enumerate(layers) for n in ("keys", "values")}, path)
            make_s.append(time.perf_counter() - begin_s)
            sizes.append(path.stat().st_size)
            del cache, layers
            forget(path)
            clock, begin_s = Clock(), time.perf_counter()
            tensors, cache = load_file(path), DynamicCache()
            for layer in range(model.config.num_hidden_layers):
                cache.update(tensors[f"{layer}.keys"], tensors[f"{layer}.values"], layer)
            prompt = torch.tensor([[*ids, *page["question"]]])
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=work["end_ids"],
                pad_token_id=work["end_ids"][0],
                streamer=clock,
            )
            answer = out[0, prompt.shape[1] :].tolist()
            answered.append((clock.times[1] - begin_s, time.perf_counter() - begin_s, answer))
    return answered, {"make_s": statistics.mean(make_s), "size_bytes": statistics.mean(sizes)}


def forget(path: Path) -> None:
    """Drop a file from the page cache, where the system allows it (Linux)."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- llama.cpp, in its own environment ---------------------------------------------------------------------------------


def llama(args: argparse.Namespace) -> None:
    """A way of llama.cpp, by `llama_cpp_way.py` in the other environment."""
    from transformers import AutoTokenizer

    from kv_memory.model.embedded import built_in, prepared_folder

    if args.llama_python is None or not args.llama_python.exists() or args.gguf is None or not args.gguf.exists():
        print(f"{args.way} is skipped: pass --llama-python and --gguf, both of files that exist", file=sys.stderr)
        return
    script = Path(__file__).with_name("llama_cpp_way.py")
    command = [args.llama_python, script, args.way, args.gguf, args.folder, str(args.threads), str(MAX_TOKENS)]
    done = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    found = built_in(args.model)
    assert found is not None, "only built-in models"
    tokenizer = AutoTokenizer.from_pretrained(prepared_folder(found))
    work = json.loads((args.folder / "work.json").read_text())
    save(args.folder, args.way, work, result["answered"], result["made"], tokenizer)


# -- rows --------------------------------------------------------------------------------------------------------------


def save(
    folder: Path, name: str, work: Any, answered: Sequence[Answered], made: dict[str, float], tokenizer: Any
) -> None:
    """Write a way's row, in place of an earlier one."""
    from kv_memory.evaluate.metrics import f1

    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for _, _, ids in answered]
    scores = [f1(text, page["answers"]) for text, page in zip(texts, work["pages"], strict=True)]
    decode = [(total - first) / (len(ids) - 1) for first, total, ids in answered if len(ids) > 1]
    row = {
        "path": name,
        "ttft_s": statistics.median(first for first, _, _ in answered),
        "total_s": statistics.median(total for _, total, _ in answered),
        "token_s": statistics.median(decode),
        "n_tokens_answer": statistics.mean(len(ids) for _, _, ids in answered),
        "f1": statistics.mean(scores),
        "n_questions": len(scores),
        "n_tokens_document": statistics.mean(len(page["document"]) for page in work["pages"]),
        **made,
    }
    others = [one for one in rows_of(folder) if one["path"] != name]
    lines = [json.dumps(one) + "\n" for one in [*others, row]]
    (folder / "rows.jsonl").write_text("".join(lines))
    print(json.dumps(row), flush=True)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows that a folder has."""
    path = folder / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(folder: Path) -> None:
    """Print the rows, and after how many questions compressing pays."""
    rows = {row["path"]: row for row in rows_of(folder)}
    print("\n".join(table(rows)))
    print()
    print("\n".join(break_even(rows)))


def table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| way | first token | whole answer | a token | made in | on disk, a document | F1 |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, row in rows.items():
        yield (
            f"| `{name}` | {row['ttft_s']:.3f} s | {row['total_s']:.2f} s | {row['token_s'] * 1e3:.0f} ms "
            f"| {row['make_s']:.2f} s | {row['size_bytes'] / 1e6:.3f} MB | {row['f1']:.2f} |"
        )


def break_even(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines of a table: distilled caches against each other way, in questions a document, and in bytes."""
    yield "| `kv_memory_cold` against | first token | whole answer | pays after, in time | bytes on disk |"
    yield "|---|---:|---:|---:|---:|"
    for suffix, (name, row) in itertools.product(("", "_int8"), rows.items()):
        own = rows.get(f"kv_memory_cold{suffix}")
        if own is None or name.startswith("kv_memory") or (suffix and name + suffix in rows):
            continue
        saved_s, cost_s = row["total_s"] - own["total_s"], own["make_s"] - row["make_s"]
        pays = "never" if saved_s <= 0 else f"{max(1, round(cost_s / saved_s + 0.5))} questions"
        yield (
            f"| `{name}`{' (int8)' if suffix else ''} | {own['ttft_s'] / row['ttft_s']:.3f} "
            f"| {own['total_s'] / row['total_s']:.2f} | {pays} | {own['size_bytes'] / row['size_bytes']:.2f} |"
        )


if __name__ == "__main__":
    main()
