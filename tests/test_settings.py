"""Settings: one frozen object, and what a caller may give to change it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kv_memory import KVMemory
from kv_memory.errors import ConfigError
from kv_memory.settings import MemorySettings
from tests.memories import FERRY, FERRY_QUESTION, answerable, open_memory


def test_written_forms_of_values_are_accepted() -> None:
    given = {"keep_ratio": "1/8", "passage_tokens": "64", "adapter": "none", "model": Path("a/model")}
    made = MemorySettings.resolve({}, **given)
    assert (made.keep_ratio, made.passage_tokens, made.adapter, made.model) == (0.125, 64, None, "a/model")
    assert MemorySettings.resolve({}, max_bytes="1.5KiB").keep.max_bytes == 1536
    assert MemorySettings.resolve({"passage_tokens": 64}, passage_tokens="whole").passage_tokens is None


def test_none_leaves_a_setting_as_it_is() -> None:
    recorded = dataclasses.asdict(MemorySettings(model="m", keep_tokens=7, passage_tokens=64, keep_text=True))
    nothing = dict.fromkeys(recorded) | {"passage_tokens": "auto"}
    assert dataclasses.asdict(MemorySettings.resolve(recorded, **nothing)) == recorded
    assert MemorySettings.resolve(recorded, passage_tokens=None).passage_tokens is None


@pytest.mark.parametrize(
    ("changes", "where", "step"),
    [
        ({"keep_ration": 0.5}, "keep_ration", "'keep_ratio'"),
        ({"devise": "cpu"}, "devise", "'device'"),
        ({"temprature": 0.5}, "temprature", "Use one of"),
        ({"selector": "atention"}, "selector", "attention"),
        ({"storage": "int4"}, "storage", "int8"),
        ({"prompt": "poem"}, "prompt", "passage"),
        ({"layout": "dense"}, "layout", "packed"),
        ({"order": "worst"}, "order", "best_last"),
        ({"rank_bias": 0.5}, "rank_bias", "-1"),
        ({"rank_bias": float("nan")}, "rank_bias", "-1"),
        ({"rank_bias": "low"}, "rank_bias", "-1"),
        ({"passage_tokens": 15}, "passage_tokens", None),
        ({"passage_tokens": "some"}, "passage_tokens", "512"),
        ({"refine_steps": -1}, "refine_steps", None),
        ({"refine_steps": 1.5}, "refine_steps", None),
        ({"min_fidelity": "low"}, "min_fidelity", None),
        ({"keep_text": "yes"}, "keep_text", None),
        ({"adapter": 7}, "adapter", None),
        ({"model": ""}, "model", None),
        ({"keep_ratio": "a half"}, "keep_ratio", "1/8"),
        ({"max_bytes": "some"}, "max_bytes", "2GiB"),
    ],
)
def test_unknown_names_and_wrong_values_leave_no_store_behind(
    tmp_path: Path, changes: dict[str, Any], where: str, step: str | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        KVMemory.open(tmp_path / "store", **changes)
    assert caught.value.where == where and (step or "") in (caught.value.next_step or "")
    assert not (tmp_path / "store").exists()


def test_given_settings_replace_the_recorded_ones(tmp_path: Path, wide: Any) -> None:
    with open_memory(tmp_path / "store", wide, keep_text=True) as memory:
        memory.add(("ferry", FERRY))
        assert memory.in_collection("other", keep_ratio="1/2").settings.keep_ratio == 0.5
        with pytest.raises(ConfigError, match="unknown setting of a collection 'selector'"):
            memory.in_collection("other", selector="attention")
    settings = MemorySettings(model=wide.name, selector="attention", passage_tokens=32)
    with KVMemory.open(tmp_path / "store", settings, model=wide, keep_tokens=9) as memory:
        assert memory.settings == dataclasses.replace(settings, keep_ratio=None, keep_tokens=9)
        memory.refresh()
        assert answerable(memory, FERRY_QUESTION) == ["ferry"]
