"""What is freed goes back to the operating system."""

from __future__ import annotations

import platform

import pytest
import torch

from kv_memory.train.heap import trim_heap


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_free_heap_memory_is_returned_to_the_system() -> None:
    tensors = [torch.ones(16_000) for _ in range(2000)]  # 64 kB each: below what glibc maps apart
    del tensors[::2]  # holes, which shrink no heap
    before = resident_bytes()
    assert trim_heap()
    assert before - resident_bytes() > 30e6
    assert len(tensors) == 1000
