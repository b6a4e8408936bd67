"""Drives a job with odd workers or on Ray, as a process that can be killed. Arguments: store, job, workers, engine."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from kv_memory.jobs import Ledger
from kv_memory.jobs.driver import drive
from kv_memory.jobs.engines import Engine
from kv_memory.jobs.engines.local import LocalEngine
from kv_memory.jobs.engines.ray import RayEngine
from kv_memory.store import Store

ODD_WORKER = (sys.executable, str(Path(__file__).with_name("odd_worker.py")))

if __name__ == "__main__":
    path, job, n_workers, kind = sys.argv[1:]
    with Store.open(path, create=False) as store:
        engine: Engine
        if kind == "ray":
            engine = RayEngine(store, n_workers=int(n_workers), lease_s=20)
        else:
            engine = LocalEngine(store.path, n_workers=int(n_workers), command=ODD_WORKER, lease_s=20)
        ended = drive(store, Ledger(store).job(job), engine, resumed=True)
        print(json.dumps(dataclasses.asdict(ended)))
