"""A model in a forked child, on a device that is not there, and from a hub that cannot be reached."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from kv_memory.errors import ConfigError
from kv_memory.model.loading import best_device, check_device

FORKED = """
import os, signal, sys
import torch
from kv_memory import KVMemoryError
from kv_memory.compress import Compressor
from tests.memories import wide_backbone

torch.set_num_threads(int(sys.argv[1]))
compressor = Compressor(wide_backbone(), selector="sink_recent")
text = "The ferry to Skarholm leaves at seven from pier four. " * 20
compressor.compress(text, keep_ratio=0.5)
if os.fork() == 0:
    signal.alarm(60)  # a child that hangs is killed
    try:
        compressor.compress(text, keep_ratio=0.5)
    except KVMemoryError as error:
        print(error.what)
    else:
        print("compressed")
    sys.stdout.flush()
    os._exit(0)
print(os.wait()[1], flush=True)
"""


@pytest.mark.parametrize(
    ("n_threads", "said"), [(2, "the model was loaded before this process was forked"), (1, "compressed")]
)
def test_a_model_carried_over_a_fork_does_not_hang(n_threads: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(n_threads)], capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stdout.splitlines() == [said, "0"]


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "mps", "gpu", "", "tpu:0"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    if device.split(":")[0] == best_device():
        pytest.skip("this machine has one")
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        check_device(device)
    assert "'auto'" in str(caught.value.next_step)


OFFLINE = """
from kv_memory import KVMemoryError
from kv_memory.model.backbone import Backbone

try:
    Backbone.load("kv-memory-tests/no-such-model")
except KVMemoryError as error:
    print(error.what)
"""


def test_a_hub_that_cannot_be_reached_is_asked_once() -> None:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"},
    )
    assert done.stdout.splitlines() == ["no such model here, and the hub cannot be reached"]
    assert "Retry" not in done.stderr
    assert time.perf_counter() - started < 60  # the retries alone would take 24 s for each file


STREAM = """
import os, signal, sys, threading, time
import torch
from kv_memory import DecodeSettings
from kv_memory.generate import Generator
from tests.memories import wide_backbone

torch.set_num_threads(1)
backbone = wide_backbone()
generator = Generator(backbone)
settings = DecodeSettings(max_new_tokens=40, temperature=1.0, seed=7)
expected = generator.generate("why?", settings=settings).text
stream, other = generator.stream("why?", settings=settings), generator.stream("who?", settings=settings)
pieces = [next(stream)]
if os.fork() == 0:
    signal.alarm(60)  # a child that hangs is killed
    print("".join([*pieces, *stream]) == expected, generator.generate("why?", settings=settings).text == expected)
    sys.stdout.flush()
    os._exit(0)
os.wait()
print("".join([*pieces, *stream]) == expected, other.answer.n_new_tokens, flush=True)
"""


def test_answers_go_on_in_parent_and_child_after_a_fork() -> None:
    done = subprocess.run([sys.executable, "-c", STREAM], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.splitlines() == ["True True", "True 40"]


HELD = """
import os, signal, sys, threading, time
import torch
from kv_memory import DecodeSettings, KVMemoryError
from kv_memory.generate import Generator
from tests.memories import wide_backbone

torch.set_num_threads(1)
backbone = wide_backbone()
generator = Generator(backbone)
mine = generator.stream("why?")
generator.scheduler._lock.acquire()  # as another thread may do at the moment of the fork
generator.scheduler._step = [(mine._request, [1])]  # in the middle of a step
if os.fork() == 0:
    signal.alarm(60)
    try:
        next(mine)
    except KVMemoryError as error:
        print(error.what)
    print(generator.generate("who?", settings=DecodeSettings(max_new_tokens=3)).n_new_tokens, flush=True)
    os._exit(0)
os.wait()
"""


def test_a_fork_in_the_middle_of_a_step_does_not_hang_the_child() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.splitlines() == ["the process was forked during a forward pass", "3"]
