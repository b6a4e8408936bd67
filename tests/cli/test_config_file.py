"""Settings from a file, from `--set` and from options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from kv_memory.cli.config_file import Given, settings_of
from kv_memory.errors import ConfigError
from tests.cli.ran import Ran


@dataclass(frozen=True)
class Sizes:
    """Sizes of something.

    Attributes:
        steps: Number of steps.
        ratios: Keep ratios, of which
            there may be several.
        folder: Folder, if any.

    Raises:
        ConfigError: Never.
    """

    steps: int = 5
    ratios: tuple[float, ...] = (0.5,)
    folder: Path | None = None
    form: Literal["long", "short"] = "long"
    exact: bool = False
    secret: str = ""


KNOWN = settings_of(Sizes, without={"secret"})


def gather(*assignments: str, config: Path | None = None, **options: Any) -> dict[str, Any]:
    return Given(config, [*assignments]).gather(KNOWN, **options)[Sizes]


def test_settings_are_the_fields_with_their_meanings() -> None:
    assert list(KNOWN) == ["steps", "ratios", "folder", "form", "exact"]
    assert KNOWN["ratios"].meaning == "Keep ratios, of which there may be several."
    assert KNOWN["folder"].meaning == "Folder, if any."


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("steps=7", {"steps": 7}),
        ("ratios=1/4, 0.125", {"ratios": (0.25, 0.125)}),
        ("folder=a b", {"folder": Path("a b")}),
        ("folder=none", {"folder": None}),
        ("form=short", {"form": "short"}),
        ("exact=True", {"exact": True}),
    ],
)
def test_values_get_their_types(assignment: str, value: dict[str, Any]) -> None:
    assert gather(assignment) == value


def test_set_takes_precedence_over_options_and_these_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('steps = 1\nratios = ["1/8", 0.5]\nexact = true\n')
    assert gather(config=file) == {"steps": 1, "ratios": (0.125, 0.5), "exact": True}
    assert gather(config=file, steps=2, folder=None)["steps"] == 2
    assert gather("steps=3", config=file, steps=2)["steps"] == 3
    (tmp_path / "run.json").write_text('{"steps": 4, "folder": null}')
    assert gather(config=tmp_path / "run.json") == {"steps": 4, "folder": None}


@pytest.mark.parametrize(
    ("assignment", "what", "step"),
    [
        ("steps", "--set must be NAME=VALUE", "year=2026"),
        ("stepz=1", "unknown setting 'stepz'", "Did you mean 'steps'?"),
        ("secret=1", "unknown setting 'secret'", "--list-settings prints all"),
        ("steps=six", "steps must be a whole number", ""),
        ("steps=1.5", "steps must be a whole number", ""),
        ("ratios=1/0", "ratios must be a number or a fraction", ""),
        ("ratios=nan", "ratios must be a number or a fraction", ""),
        ("form=tall", "form must be one of long, short, got 'tall'", ""),
        ("exact=yes", "exact must be true or false", ""),
    ],
)
def test_a_wrong_assignment_is_refused(assignment: str, what: str, step: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gather(assignment)
    assert what in caught.value.what and step in (caught.value.next_step or "")


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("run.toml", "steps = ", "the settings cannot be read"),
        ("run.json", "[1]", "the settings cannot be read"),
        ("run.toml", "stepz = 1", "unknown setting 'stepz'"),
        ("run.toml", "steps = true", "steps must be a whole number"),
        ("run.toml", "steps = [1]", "steps must be one value"),
        ("run.toml", "[steps]", "steps must be one value"),
        ("run.json", '{"steps": null}', "steps must be one value"),
        ("none.toml", None, "the settings cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(tmp_path: Path, name: str, text: str | None, what: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        gather(config=tmp_path / name)
    assert what in caught.value.what and caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize(("command", "names"), [("train", ("rank", "eval_every", "init")), ("eval", ("k", "storage"))])
def test_settings_are_listed_with_defaults_and_meanings(
    kv: Callable[..., Ran], command: str, names: tuple[str, ...]
) -> None:
    done = kv(command, "--list-settings")
    assert done.code == 0
    listed = {line.split()[0]: line for line in done.out.splitlines()}
    assert {"setting", "model", *names} <= set(listed)
    assert "One of auto, float32, bfloat16, float16." in listed["dtype"]
    assert all(len(line.split()) > 3 for line in listed.values() if not line.startswith("setting"))
