from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kv_memory.config import DecodeSettings
from kv_memory.errors import ConfigError, DecodeTimeoutError, KVMemoryError
from kv_memory.generate import Generator, generator, request
from tests.reference import recorded_inputs

FREE = DecodeSettings(max_new_tokens=30)
LIMITED = DecodeSettings(max_new_tokens=30, timeout_s=9.5)


@pytest.fixture
def passes_take(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Sets how long a forward pass takes, on a clock that nothing else moves."""
    backbone.prefix  # noqa: B018 (so that it takes none of the time)
    now_s, step_s = 0.0, 0.0

    def tick(*_: Any) -> None:
        nonlocal now_s
        now_s += step_s

    def take(seconds: float) -> None:
        nonlocal step_s
        step_s = seconds

    for module in (generator, request):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now_s))
    handle = backbone.decoder.register_forward_pre_hook(tick)
    yield take
    handle.remove()


def test_decoding_stops_at_the_time_limit(backbone: Any, passes_take: Any) -> None:
    expected = Generator(backbone).generate("why?", settings=FREE)
    assert len(expected.token_ids) == 30
    passes_take(1.0)
    with recorded_inputs(backbone) as inputs, pytest.raises(DecodeTimeoutError) as caught:
        Generator(backbone).generate("why?", settings=LIMITED)
    assert len(inputs) == 10  # no pass is begun once the time is over
    assert caught.value.what == "the answer is not complete after 9.5 s; 10 tokens were decoded"
    assert caught.value.where == "timeout_s" and caught.value.next_step
    assert isinstance(caught.value, TimeoutError) and isinstance(caught.value, KVMemoryError)
    # The next answer is not disturbed, and has time of its own.
    passes_take(0.1)
    assert Generator(backbone).generate("why?", settings=LIMITED).token_ids == expected.token_ids


def test_the_prefill_counts_towards_the_time_limit(backbone: Any, passes_take: Any) -> None:
    passes_take(10.0)
    with recorded_inputs(backbone) as inputs, pytest.raises(DecodeTimeoutError):
        Generator(backbone).generate("why?", settings=LIMITED)
    assert len(inputs) == 1


def test_a_stream_returns_its_pieces_before_the_timeout(backbone: Any, passes_take: Any) -> None:
    expected = Generator(backbone).generate("why?", settings=FREE)
    passes_take(1.0)
    pieces: list[str] = []
    stream = Generator(backbone).stream("why?", settings=LIMITED)
    with pytest.raises(DecodeTimeoutError):
        for piece in stream:
            pieces.append(piece)
    assert 3 < len(pieces) <= 10 and expected.text.startswith("".join(pieces))


def test_a_batch_shares_one_time_limit(backbone: Any, passes_take: Any) -> None:
    passes_take(1.0)
    with recorded_inputs(backbone) as inputs, pytest.raises(DecodeTimeoutError):
        Generator(backbone).generate_batch(["why?", "where is it?"], settings=LIMITED)
    assert len(inputs) == 10


def test_a_complete_answer_never_times_out(backbone: Any, passes_take: Any) -> None:
    passes_take(10.0)
    answer = Generator(backbone).generate("why?", settings=DecodeSettings(max_new_tokens=1, timeout_s=1.0))
    assert len(answer.token_ids) == 1


@pytest.mark.parametrize("timeout_s", [0, 0.0, -1.0, float("nan")])
def test_time_limits_out_of_range_are_refused(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="timeout_s must be above 0 or None") as caught:
        DecodeSettings(timeout_s=timeout_s)
    assert caught.value.where == "timeout_s"
