"""Prometheus metrics of a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kv_memory.generate import Answer

_SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "kv_memory_http_requests", "requests, by route and status", ["route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "kv_memory_http_request_seconds",
            "seconds from a request's arrival to the end of its response",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.ttft_s = Histogram(
            "kv_memory_ttft_seconds",
            "seconds from a request's arrival to the first piece of its answer, with the time in the queue",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.in_progress = Gauge(
            "kv_memory_answers_in_progress", "answers that are decoded or wait for it", registry=self._registry
        )
        self.jobs = Gauge("kv_memory_jobs_waiting", "jobs that wait or run in this process", registry=self._registry)
        self._tokens = Counter(
            "kv_memory_tokens",
            "tokens; kind: prompt (prefilled), cached (entries of caches used instead), completion (decoded)",
            ["kind"],
            registry=self._registry,
        )

    def count(self, answer: Answer) -> None:
        """Count the tokens of an answer."""
        self._tokens.labels("prompt").inc(answer.n_prompt_tokens)
        self._tokens.labels("cached").inc(max(0, answer.n_cached_tokens))
        self._tokens.labels("completion").inc(answer.n_new_tokens)

    def text(self) -> str:
        """The metrics in Prometheus's text format."""
        return generate_latest(self._registry).decode()
