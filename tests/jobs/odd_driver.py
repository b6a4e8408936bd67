"""Drives a job with odd workers, as a process that can be killed. Arguments: store, job, number of workers."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from kv_memory.jobs import Ledger
from kv_memory.jobs.driver import drive
from kv_memory.jobs.engines.local import LocalEngine
from kv_memory.store import Store

ODD_WORKER = (sys.executable, str(Path(__file__).with_name("odd_worker.py")))

if __name__ == "__main__":
    with Store.open(sys.argv[1], create=False) as store:
        engine = LocalEngine(store.path, n_workers=int(sys.argv[3]), command=ODD_WORKER, lease_s=20)
        ended = drive(store, Ledger(store).job(sys.argv[2]), engine, resumed=True)
        print(json.dumps(dataclasses.asdict(ended)))
