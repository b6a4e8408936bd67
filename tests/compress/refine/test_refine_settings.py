from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from kv_memory.compress import Compressor, RefineSettings
from kv_memory.errors import ConfigError
from tests.reference import shared_backbone

SETTINGS = RefineSettings(steps=6, n_probes=4)


def test_fingerprint_covers_every_setting_that_affects_the_result() -> None:
    backbone = shared_backbone("llama")

    def method(**changes: Any) -> str:
        refine = replace(SETTINGS, **changes)
        return Compressor(backbone, selector="attention", window_tokens=64, refine=refine).fingerprint().method

    plain = Compressor(backbone, selector="attention", window_tokens=64).fingerprint().method
    assert method().startswith(f"{plain}|refine:6:")
    changes = {"steps": 7, "lr": 0.1, "n_probes": 8, "seed": 1, "min_fidelity": 0.5, "forward_weight": 0.5}
    assert len({method(), *(method(**{name: value}) for name, value in changes.items())}) == 7
    assert method(max_entries=64) == method()


def test_more_steps_train_on_more_probes() -> None:
    assert [RefineSettings(steps=steps).practised for steps in (8, 18, 24, 48, 144)] == [8, 9, 24, 24, 72]
    assert RefineSettings(steps=144, n_probes=24).practised == 24
    assert RefineSettings(steps=144).name == RefineSettings(steps=144, n_probes=72).name


def test_few_steps_hold_few_probes_out() -> None:
    assert [RefineSettings(steps=steps).held_out for steps in (8, 23, 24, 144)] == [1, 1, 2, 2]
    assert RefineSettings(steps=8).name == RefineSettings(steps=8, n_probes=8, n_held_out=1).name
    assert RefineSettings(steps=8).name != RefineSettings(steps=8, n_held_out=2).name


def test_more_steps_wait_longer_for_a_gain() -> None:
    assert [RefineSettings(steps=steps).most_looks_without_gain for steps in (16, 48, 144)] == [2, 2, 6]


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"lr": 0.0},
        {"lr": math.inf},
        {"n_probes": 3},
        {"probes_per_step": 0},
        {"n_held_out": 0},
        {"probe_tokens": 8},
        {"forward_weight": 1.5},
        {"temperature": -1.0},
        {"evaluate_every": 0},
        {"patience": 0},
        {"tolerance": -0.1},
        {"min_fidelity": 0.0},
        {"steps": 16, "max_steps": 8},
        {"max_entries": 0},
    ],
)
def test_settings_out_of_range_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        RefineSettings(**wrong)
    assert caught.value.where == list(wrong)[-1]
