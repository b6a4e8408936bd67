"""Every field of the fingerprint, changed one at a time."""

from __future__ import annotations

import pytest

from kv_memory.store import Store
from tests.stress.mismatch import FIELDS, mismatch


@pytest.mark.parametrize("how", ["else", "last"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_cache_that_differs_in_one_field_is_refused(store: Store, field: str, how: str) -> None:
    assert mismatch(store, field, how) == []
