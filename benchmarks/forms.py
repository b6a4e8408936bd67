"""Forms of the adapter, each trained for the same time on the same data: how close are their answers to the full cache?

    python benchmarks/forms.py                          # all forms, ten minutes each; resumes where it stopped
    python benchmarks/forms.py --only paper --only default --time-limit 1200
    python benchmarks/forms.py --table                  # the results so far, as Markdown

Each form is a run of `kv-memory train` in its own folder (`--work`), and ends with the KL to the full cache on held-out
documents, the same for all. Run nothing else meanwhile: a form with less of the machine is trained less. A few minutes
show what learns quickly, not what is best in the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_PAPER = ["--set", "preset=paper"]
_HEAD = ["--set", "scorer=head", "--set", "scorer_size=256"]

# What it shows, and how it differs from the default. In the order of the table.
FORMS: dict[str, tuple[str, list[str]]] = {
    "paper": ("as published: a score per token, W_Q and W_O of kept tokens", _PAPER),
    "paper_heads": ("a score for each KV head", [*_PAPER, *_HEAD]),
    "paper_one_ranking": ("and one ranking over all heads", [*_PAPER, *_HEAD, "--set", "budget=model"]),
    "document": (
        "and all tokens of the document routed",
        [*_PAPER, *_HEAD, "--set", "budget=model", "--set", "routed=document"],
    ),
    "head_scorer": ("and W_K, W_V, strength by keep ratio, loss weighted by it", _HEAD),
    "default": ("and a scorer in each layer: the default", []),
    "without_strength": ("default, full strength at every ratio", ["--set", "full_strength_ratio=1"]),
    "without_weights": ("default, losses not weighted by keep ratio", ["--set", "ratio_power=0"]),
    "q_o": ("default, only W_Q and W_O", ["--set", "targets=q,o"]),
    "eta_3": ("scorer for all heads at layer 3", [*_HEAD, "--set", "eta=3"]),
    "eta_12": ("scorer for all heads at layer 12", [*_HEAD, "--set", "eta=12"]),
    "one_pass": (
        "scorer for all heads at layer 6, routed from there: one pass",
        [*_HEAD, "--set", "first_routed_layer=6"],
    ),
    "from_layer_6": ("default, routed from layer 6 upwards", ["--set", "first_routed_layer=6"]),
    "rank_16": ("default, rank 16", ["--set", "rank=16"]),
    "rank_128": ("default, rank 128", ["--set", "rank=128"]),
    "teacher_answers": ("default, answers written by the teacher", ["--set", "answers=teacher"]),
}


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", help="sets to train on (default: squad); repeatable")
    parser.add_argument("--time-limit", type=float, default=600, help="seconds for each form (default: 600)")
    parser.add_argument("--eval-documents", type=int, default=16, help="held-out documents (default: 16)")
    parser.add_argument("--lr-lora", type=float, default=8e-4, help="learning rate of the LoRA (default: 8e-4)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/forms"), help="folder of the runs (default: runs/forms)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/results/forms.jsonl"),
        help="one line per form (default: docs/results/...)",
    )
    parser.add_argument("--only", action="append", choices=FORMS, metavar="FORM", help="only these; repeatable")
    parser.add_argument("--table", action="store_true", help="print the table of what is measured; train nothing")
    args = parser.parse_args()
    results = {row["form"]: row for row in _lines(args.out)}
    other = [name for name, row in results.items() if row["time_limit_s"] != args.time_limit]
    if other and not args.table:
        sys.exit(f"{args.out} has forms trained with a different time limit: {', '.join(other)}. Pass another --out.")
    for name in [] if args.table else args.only or FORMS:
        if name not in results:
            results[name] = train(args, name)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(json.dumps(results[name]) + "\n")
    print(table([results[name] for name in FORMS if name in results]))


def train(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One form, in a process of its own."""
    out = args.work / name
    options = ["--time-limit", f"{args.time_limit:g}", "--set", "eval_every=100000"]
    options += ["--set", f"eval_documents={args.eval_documents}", "--set", f"lr_lora={args.lr_lora:g}", *FORMS[name][1]]
    sources = [part for source in args.data or ["squad"] for part in ("--data", source)]
    command = ["kv-memory", "train", str(out), *sources, *options]
    print(f"{name}: {' '.join(command)}", file=sys.stderr, flush=True)
    more = ["--resume"] if (out / "checkpoints").is_dir() else []
    script = str(Path(sys.executable).with_name("kv-memory"))
    done = subprocess.run([script, *command[1:], *more, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name} failed: {done.stdout.strip()}")
    report = json.loads(done.stdout.splitlines()[-1])
    return {
        "form": name,
        "command": " ".join(command),
        "time_limit_s": args.time_limit,
        "kl": report["kl"],
        "reconstruction": report["baseline"],
        "none": report["none"],
        "warmup_steps": report["settings"]["warmup_steps"],
        "steps": report["step"] - report["settings"]["warmup_steps"],
        "elapsed_s": round(report["elapsed_s"]),
        "n_held_out": report["n_held_out"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a form, its KL at each keep ratio."""
    if not rows:
        return "nothing measured yet"
    ratios = sorted(rows[0]["kl"], key=float, reverse=True)
    lines = [
        f"| form | what it is | steps | {' | '.join(f'1/{round(1 / float(ratio))}' for ratio in ratios)} |",
        f"| --- | --- | ---: | {' | '.join('---:' for _ in ratios)} |",
    ]
    kl = [f"{rows[0]['reconstruction'][ratio]:.3f}" for ratio in ratios]
    lines.append(f"| `reconstruction` | no training | | {' | '.join(kl)} |")
    for row in rows:
        kl = [f"{row['kl'][ratio]:.3f}" for ratio in ratios]
        steps = f"{row['warmup_steps']} + {row['steps']}"
        lines.append(f"| {row['form']} | {FORMS[row['form']][0]} | {steps} | {' | '.join(kl)} |")
    return "\n".join(lines)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


if __name__ == "__main__":
    main()
