"""Writes the work for the peers: documents, questions and the full cache's own answers, as token ids.

    python benchmarks/peers/export.py --n-documents 60 --out benchmarks/peers/results/work.jsonl

Runs in the package's environment; `press.py` then needs nothing of it. Documents and questions are those of `kv-memory
eval`, chosen and encoded by its code. An existing file is extended: `--n-documents 60` after 20 adds the other 40.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kv_memory import Backbone
from kv_memory.compress import Compressor, SinkRecent
from kv_memory.config import n_kept_for
from kv_memory.evaluate.cases import Case, encode_query
from kv_memory.evaluate.scoring import KL_TOKENS, greedy_answers
from kv_memory.evaluate.tasks import find_task
from kv_memory.evaluate.tasks.task import Task, TaskSettings
from kv_memory.model.embedded import built_in


def main() -> None:
    """Write the work file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="squad", choices=["squad", "needle", "spans"])
    parser.add_argument("--model", default="qwen-0.5b", help="built-in, a folder or a hub id (default: qwen-0.5b)")
    parser.add_argument("--prompt", default="auto", choices=["auto", "chat", "brief", "passage"])
    parser.add_argument("--n-documents", type=int, default=60, help="documents, except for needle (default: 60)")
    parser.add_argument("--min-tokens", type=int, help="length of the shortest document")
    parser.add_argument("--max-tokens", type=int, help="length of the longest document")
    parser.add_argument("--corpus", nargs="+", default=[], help="spans: names of sets, or paths")
    parser.add_argument("--held-out", type=float, help="spans: share held out of training; only these")
    parser.add_argument("--seed", type=int, default=0, help="seed of needles and spans")
    parser.add_argument("--keep-ratio", type=ratio, nargs="+", action="extend", help="default: 1/2 to 1/32")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    args.keep_ratio = args.keep_ratio or [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]

    task = find_task(args.task)
    settings = TaskSettings(
        n_documents=args.n_documents,
        min_tokens=args.min_tokens,
        max_tokens=args.max_tokens,
        seed=args.seed,
        corpus=tuple(args.corpus),
        held_out=args.held_out,
    )
    backbone = Backbone.load(args.model, prompt=args.prompt)
    cases = task.cases(backbone, settings)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = args.out.with_suffix(".part")  # an existing file is complete: `make run` relies on that
    top = header(backbone, args.model, task)
    known = earlier(args.out, top) | earlier(scratch, top)
    with scratch.open("w", encoding="utf-8") as file:
        print(json.dumps(top), file=file)
        for number, case in enumerate(cases, start=1):
            if (line := known.get(case.id)) is None or set(line["n_kept"]) != {str(r) for r in args.keep_ratio}:
                line = document(backbone, task, case, args.keep_ratio)
            print(json.dumps(line), file=file, flush=True)
            print(f"\r{number}/{len(cases)} documents", end="", flush=True)
    scratch.replace(args.out)
    print(f"\nwrote {args.out}")


def ratio(text: str) -> float:
    """A share written as `1/8` or `0.125`."""
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


def earlier(path: Path, top: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Complete lines of a work file with the same header, by document."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    if not lines or lines[0] != json.dumps(top) + "\n":
        return {}
    found = [json.loads(line) for line in lines[1:] if line.endswith("\n")]
    return {line["document"]: line for line in found}


def header(backbone: Backbone, model: str, task: Task) -> dict[str, Any]:
    """The header, which holds for all documents."""
    config = backbone.model.generation_config
    ends = [backbone.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    flat = [token for end in ends for token in (end if isinstance(end, list) else [end]) if token is not None]
    return {
        "task": task.name,
        "text_metrics": list(task.text_metrics),
        "score": task.score,
        "model": str(known.folder) if (known := built_in(model)) else model,  # a name Transformers knows
        "weights": backbone.weights_sha256,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "prompt": backbone.prompt.name,
        "prefix_ids": list(backbone.prefix_ids),
        # What follows a request before the model speaks: the end of the chat template, or a line break.
        "tail_ids": backbone.encode("\n" if backbone.prompt.name == "passage" else backbone.prompt.question_after),
        "stop": list(backbone.prompt.stop),
        "end_ids": sorted(set(flat)),
        "max_new_tokens": task.max_new_tokens,
    }


def document(backbone: Backbone, task: Task, case: Case, keep_ratios: list[float]) -> dict[str, Any]:
    """One document with its questions and the full cache's greedy answers."""
    ids = backbone.encode_document(case.text)
    encoded = [encode_query(backbone, query) for query in case.queries]
    if task.kl_on == "answer":
        full = Compressor(backbone, selector=SinkRecent()).compress(case.text, keep_ratio=1.0)
        asked = [query.prompt for query in encoded]
        said = greedy_answers(backbone, full, asked, layout="source", max_new_tokens=task.max_new_tokens)
    else:
        said = [("", query.reference) for query in encoded]
    return {
        "document": case.id,
        "ids": ids,
        "n_kept": {str(keep_ratio): n_kept_for(len(ids), keep_ratio) for keep_ratio in keep_ratios},
        "questions": [
            {
                "ids": list(one.prompt),
                "references": list(query.references),
                "reference_ids": list(one.reference),
                "teacher_ids": list(teacher_ids[:KL_TOKENS]),
                "teacher_text": text.strip(),
            }
            for query, one, (text, teacher_ids) in zip(case.queries, encoded, said, strict=True)
        ],
    }


if __name__ == "__main__":
    main()
