"""Stores under stress, on SQLite and PostgreSQL, on the disk and in S3: kills, damage, mismatches, races; and jobs.

    make stress                      # everything, some minutes
    make stress ARGS="--kills 50"    # less

Reports progress on standard error, and at the end one JSON object on standard output. Exits with 1 if anything was
read that was not written, anything was lost, or any payload ran.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests import services
from tests.stress.samples import PAIRS, place

COUNTS = ("kills", "flips", "mismatches", "races", "corrupt_reads", "dangling_rows", "lost_documents", "executed")
ROOT = Path(__file__).parents[2]
# Each part runs in a process of its own that has one thread, because it forks.
PART = "import sys; from tests.stress.__main__ import part; part(*sys.argv[1:])"


def part(name: str, given: str) -> None:
    """One part, on one kind of store; its arguments and its outcome are JSON."""
    logging.disable(logging.WARNING)  # the store tells of damage, which is expected here
    arguments = json.loads(given)
    folder, scratch = Path(arguments["folder"]), Path(arguments["scratch"])
    n, seed = arguments["n"], arguments["seed"]

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{arguments['label']} {done:,} of {n:,} ", end="", file=sys.stderr, flush=True)

    found: dict[str, Any]
    if name == "kills":
        from tests.stress.crash import kill_rounds

        found = kill_rounds(folder, arguments["place"], kills=n, seed=seed, scratch=scratch, progress=progress)
    elif name == "races":
        from tests.stress.races import race

        found = race(folder, arguments["place"], seconds=n, seed=seed, scratch=scratch)
    else:
        from kv_memory.store import Store
        from tests.stress.damage import damages
        from tests.stress.mismatch import FIELDS, mismatch

        with Store.open(folder, **arguments["place"]) as store:
            if name == "flips":
                found = damages(store, n=n, seed=seed, scratch=scratch, progress=progress)
            else:
                cases = [(field, how) for field in FIELDS for how in ("else", "last")]
                wrong = [problem for case in cases for problem in mismatch(store, *case)]
                found = {"mismatches": len(cases), "corrupt_reads": len(wrong), "wrong": wrong}
    print(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(prog="make stress", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=240, help="processes to kill, over all kinds of store")
    parser.add_argument("--job-kills", type=int, default=100, help="drivers and workers of jobs to kill; 0 for none")
    parser.add_argument("--flips", type=int, default=240, help="damages to make, half of them in S3")
    parser.add_argument("--seconds", type=float, default=60, help="seconds of racing, over all kinds of store")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the same seed makes the same damages")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS, help="kinds of store")
    given = parser.parse_args()
    logging.disable(logging.WARNING)  # the S3 endpoint tells of every request
    pairs: list[str] = given.pairs
    share = [(given.kills * (i + 1)) // len(pairs) - (given.kills * i) // len(pairs) for i in range(len(pairs))]
    jobs: list[tuple[str, str, float]] = [("kills", pair, n) for pair, n in zip(pairs, share, strict=True)]
    jobs += [("races", pair, given.seconds / len(pairs)) for pair in pairs]
    by_blobs = [
        next(p for p in pairs if p.endswith(blobs)) for blobs in ("disk", "s3") if any(blobs in p for p in pairs)
    ]
    jobs += [("flips", pair, given.flips // len(by_blobs)) for pair in by_blobs]
    jobs += [("mismatches", pairs[0], 0), ("mismatches", pairs[-1], 0)]
    total: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    failed = False
    print(f"seed {given.seed}", file=sys.stderr)
    with ExitStack() as stack:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment.setdefault("OMP_NUM_THREADS", "1")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-memory-stress-")))
        postgres = None
        if any("postgres" in pair for pair in pairs):
            data = stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-memory-postgres-"))
            postgres = os.environ.get("KV_MEMORY_TEST_POSTGRES") or stack.enter_context(services.postgres(Path(data)))
        if any("s3" in pair for pair in pairs):
            environment |= {**services.S3_ENVIRONMENT, "AWS_ENDPOINT_URL": stack.enter_context(services.s3())}
        for number, (name, pair, n) in enumerate(jobs):
            scratch = folder / f"{number}"
            scratch.mkdir()
            job = {
                "folder": str(scratch / "store"),
                "scratch": str(scratch),
                "place": place(pair, postgres=postgres),
                "n": n if name == "races" else int(n),
                "seed": given.seed + number,
                "label": f"{name} on {pair}:",
            }
            begun = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", PART, name, json.dumps(job)],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode:
                failed = True
                print(f"\r{name} on {pair}: failed with exit status {done.returncode}", file=sys.stderr)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            for count in COUNTS:
                total[count] += found.get(count, 0)
            failed |= bool(found["wrong"])
            _tell(f"{name} on {pair}", found, time.monotonic() - begun)
        if given.job_kills:
            failed |= _kill_jobs(given.job_kills, environment, total)
    print(json.dumps({count: total[count] for count in COUNTS}))
    return 1 if failed or any(total[count] for count in COUNTS[4:]) else 0


def _kill_jobs(n: int, environment: dict[str, str], total: Counter[str]) -> bool:
    """Kill drivers and workers of jobs; whether it failed."""
    begun = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/jobs/test_jobs_kills.py::test_many_random_kills_lose_and_repeat_nothing",
        ],
        env={**environment, "KV_MEMORY_STRESS": str(n), "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(told[-1]) if told else {}
    found["wrong"] = [f"a document was done twice: {found['done_twice']}"] if found.get("done_twice") else []
    for count in ("kills", "lost_documents"):
        total[count] += found.get(count, 0)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    _tell("kills of jobs", found, time.monotonic() - begun)
    return done.returncode != 0


def _tell(what: str, found: dict[str, Any], elapsed_s: float) -> None:
    counts = ", ".join(f"{name} {value}" for name, value in found.items() if isinstance(value, int))
    more = found.get("under_way") or found.get("per_kind") or {}
    print(f"\r{what}: {counts}; {elapsed_s:.0f} s", file=sys.stderr)
    if more:
        print("    " + ", ".join(f"{name} {n}" for name, n in sorted(more.items())), file=sys.stderr)
    if "slowest_open_s" in found:
        print(f"    the slowest opening took {found['slowest_open_s']:.2f} s", file=sys.stderr)
    for problem in found["wrong"]:
        print(f"    WRONG {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
