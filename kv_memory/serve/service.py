"""Service: the parts of a server that its endpoints share."""

from __future__ import annotations

from kv_memory.memory import KVMemory
from kv_memory.serve.decode import Gate
from kv_memory.serve.jobs import Jobs
from kv_memory.serve.metrics import Metrics
from kv_memory.serve.settings import ServeSettings


class Service:
    """The memory, the limits and the counters of one server.

    Args:
        memory: Memory with the server's own collection; its model is loaded.
        settings: Limits.
    """

    def __init__(self, memory: KVMemory, settings: ServeSettings) -> None:
        self.memory = memory
        self.settings = settings
        self.metrics = Metrics()
        self.gate = Gate(settings, self.metrics)
        self.jobs = Jobs(memory, most=settings.max_jobs, metrics=self.metrics)
