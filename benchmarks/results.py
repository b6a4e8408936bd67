"""What benchmarks have in common: rows of ratios against their goals, kept with the command that measured them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def keep_rows(name: str, rows: list[tuple[str, float, str]], **details: Any) -> None:
    """Print rows of `(path, ratio, goal)` as JSON objects, and write them to `results/NAME.jsonl`.

    `details` are whatever else describes the run: seconds, sizes. They are for reading along, not for comparing.
    """
    threads = os.environ.get("OMP_NUM_THREADS", f"{os.cpu_count()} (all)")
    command = " ".join(["python", os.path.relpath(sys.argv[0], FOLDER.parent.parent), *sys.argv[1:]])
    lines = [
        json.dumps({"path": path, "ratio": round(ratio, 4), "goal": goal, "command": command, "threads": threads})
        for path, ratio, goal in rows
    ]
    if details:
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in details.items()}
        lines.append(json.dumps({"details": rounded, "command": command}))
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    print("\n".join(lines))
