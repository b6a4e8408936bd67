"""Jobs: many documents compressed by processes of their own, with the SQL ledger as the checkpoint.

The driver (`run.py`) writes what the sources hold into the ledger, document by document; workers claim tasks from it,
and read, compress and store. Whatever dies, the ledger says what is left to do.
"""

from __future__ import annotations

from kv_memory.jobs.ledger import Ledger
from kv_memory.jobs.records import Counts, FailedTask, Job, JobSettings, Task

__all__ = ["Counts", "FailedTask", "Job", "JobSettings", "Ledger", "Task"]
