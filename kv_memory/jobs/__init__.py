"""Jobs: compress many documents in separate processes, with the SQL ledger as the checkpoint.

The driver (`driver.py`) lists the documents of the sources in the ledger. Workers claim tasks from it, and read,
compress and store the documents. Whichever process dies, the ledger records the remaining work.
"""

from __future__ import annotations

from kv_memory.jobs.job_records import Counts, FailedTask, Job, JobSettings, NotedTask, Task
from kv_memory.jobs.ledger import Ledger

__all__ = ["Counts", "FailedTask", "Job", "JobSettings", "Ledger", "NotedTask", "Task"]
