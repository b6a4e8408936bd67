"""Spans where OpenTelemetry is installed, nothing where it is not; never texts in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kv_memory import KVMemory, tracing

TEXT = "The ferry to Skarholm leaves at 7.40 from pier 4."


def test_add_and_ask_record_spans_without_texts(tmp_path: Path, wide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(tracing, "_tracer", lambda: provider.get_tracer("kv_memory"))
    with KVMemory.open(tmp_path / "store", model=wide) as memory:
        memory.add([("ferry", TEXT)])
        memory.ask("When does the ferry leave?")
    finished = spans.get_finished_spans()
    assert {"kv_memory.compress", "kv_memory.store.put", "kv_memory.store.get", "kv_memory.load"} <= {
        span.name for span in finished
    }
    assert all(key.startswith("kv_memory.") for span in finished for key in span.attributes or {})
    words = {word.strip(".") for word in TEXT.split() if len(word) > 4}
    assert not any(word in str(value) for s in finished for value in (s.attributes or {}).values() for word in words)


def test_without_opentelemetry_no_span_is_created() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from kv_memory.tracing import span\n"
        "with span('anything', n=1) as inside:\n"
        "    assert inside is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
