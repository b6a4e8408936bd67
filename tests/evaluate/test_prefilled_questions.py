from __future__ import annotations

from typing import Any

import pytest
import torch

from kv_memory.compress import Compressor
from kv_memory.evaluate.scoring import PrefilledQuestions, batches
from tests.memories import FERRY

PROMPTS = [[70, 71, 72], [80, 81, 82, 83, 84], [90]]
ROWS = [[100, 101, 102, 103], [], [110]]


def asked(backbone: Any) -> PrefilledQuestions:
    cache = Compressor(backbone, selector="sink_recent").compress(FERRY, keep_ratio=1.0)
    return PrefilledQuestions(backbone, [cache], PROMPTS, layout="source", n_new=8)


@torch.no_grad()
def test_continuations_have_the_probabilities_of_a_plain_forward_pass(roomy: Any) -> None:
    head = [*roomy.prefix_ids, *roomy.encode_document(FERRY)]
    for prompt, row, log_probs in zip(PROMPTS, ROWS, asked(roomy).follow(ROWS), strict=True):
        assert log_probs.shape == (len(row), roomy.config.vocab_size)
        if row:
            ids = torch.tensor([[*head, *prompt, *row]])
            plain = roomy.model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]).logits[0]
            torch.testing.assert_close(log_probs, plain[-len(row) - 1 : -1].log_softmax(-1), rtol=1e-3, atol=1e-3)


def test_a_continuation_does_not_change_the_cache(roomy: Any) -> None:
    one = asked(roomy)
    before = [t.clone() for t in one.follow(ROWS)]
    list(one.follow([[5, 6, 7, 8, 9], [3, 4], [120, 121, 122]]))
    assert all(torch.equal(a, b) for a, b in zip(before, one.follow(ROWS), strict=True))


@pytest.mark.parametrize(("n_entries", "sizes"), [(10, [7]), (1_000_000, [2, 2, 2, 1]), (10_000_000, [1] * 7)])
def test_batches_stay_within_the_memory_limit(roomy: Any, n_entries: int, sizes: list[int]) -> None:
    parts = batches(roomy, 7, n_entries=n_entries, n_tokens=10)
    assert [part.stop - part.start for part in parts] == sizes
    assert [row for part in parts for row in range(7)[part]] == list(range(7))
