"""Where a named set is looked for: the data folder, then the hub through a stand-in for the library `datasets`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest

from kv_memory.datasets import DATASETS, read_examples
from kv_memory.errors import ConfigError, DatasetError

FLAT = [
    {
        "title": "Foxes",
        "context": "Foxes run.",
        "question": "Who?",
        "answers": {"text": ["Foxes"], "answer_start": [0]},
    },
    {"title": "Foxes", "context": "Foxes run.", "question": "What?", "answers": {"text": ["run"], "answer_start": [6]}},
    {"title": "Cats", "context": "Cats sit.", "question": "Who?", "answers": {"text": ["Cats", "Cats"]}},
]


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KV_MEMORY_DATA", raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """The hub: rows, or an error, by id and split."""
    content: dict[tuple[str, str], Any] = {}

    def load_dataset(path: str, *, split: str, streaming: bool) -> Iterator[Any]:
        assert streaming
        if (path, split) not in content:
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub.\nSecond line.")
        return iter(content[path, split])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    return content


def write_fairytale(folder: Path, answer: str) -> None:
    text = '{"story_name": "s", "sections": [{"section": "1", "text": "T"}], "questions": [{"cor_section": "1", '
    (folder / "fairytaleqa").mkdir(parents=True)
    (folder / "fairytaleqa" / "train.jsonl").write_text(text + f'"question": "Q?", "answer1": "{answer}"}}]}}\n')


def test_data_argument_overrides_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fairytale(tmp_path / "one", "first")
    write_fairytale(tmp_path / "two", "second")
    monkeypatch.setenv("KV_MEMORY_DATA", str(tmp_path / "two"))
    assert next(read_examples("fairytaleqa")).questions[0].answers == ("second",)
    assert next(read_examples("fairytaleqa", data=tmp_path / "one")).questions[0].answers == ("first",)


def test_hub_is_used_if_the_file_is_missing(hub: dict[tuple[str, str], Any], tmp_path: Path) -> None:
    hub["rajpurkar/squad", "validation"] = FLAT
    first, second = read_examples("squad", split="dev", data=tmp_path)
    assert (first.source, first.title, len(first.questions)) == ("squad", "Foxes", 2)
    assert second.questions[0].answers == ("Cats",)


def test_paragraph_has_the_same_id_in_the_file_and_on_the_hub(hub: dict[tuple[str, str], Any], tmp_path: Path) -> None:
    hub["rajpurkar/squad", "train"] = FLAT
    (tmp_path / "squad").mkdir()
    qas = '[{"id": "1", "question": "Who?", "answers": [{"text": "Foxes"}]}]'
    nested = f'{{"data": [{{"title": "F", "paragraphs": [{{"context": "Foxes run.", "qas": {qas}}}]}}]}}'
    (tmp_path / "squad" / "train.json").write_text(nested)
    assert next(read_examples("squad")).id == next(read_examples("squad", data=tmp_path)).id


def test_dolly_from_the_hub(hub: dict[tuple[str, str], Any]) -> None:
    row = {"instruction": "Sum up.", "response": "R", "category": "c"}
    hub["databricks/databricks-dolly-15k", "train"] = [row | {"context": ""}, row | {"context": "Text."}]
    assert [e.context for e in read_examples("dolly")] == ["Text."]


def test_hub_set_with_the_right_columns(hub: dict[tuple[str, str], Any]) -> None:
    hub["me/mine", "train"] = [{"context": "C", "question": "Q?", "answer": ["A", "B"]}, {"context": "C"}]
    said: list[str] = []
    (example,) = read_examples("hf:me/mine", on_error="skip", on_skip=said.append)
    assert (example.source, example.questions[0].answers) == ("hf:me/mine", ("A", "B"))
    assert said[0].startswith("no question [hf:me/mine, row 2]")


@pytest.mark.parametrize("name", ["hf:mine", "hf:", "hf:a/b/c", "hf:/b"])
def test_a_malformed_hub_id_is_refused(hub: dict[tuple[str, str], Any], name: str) -> None:
    with pytest.raises(ConfigError, match="hf:owner/name"):
        read_examples(name)


def test_library_errors_become_dataset_errors(hub: dict[tuple[str, str], Any]) -> None:
    with pytest.raises(DatasetError, match=r"'me/none' doesn't exist on the Hub \[hf:me/none\]\. Check") as caught:
        read_examples("hf:me/none")
    assert "Second line" not in str(caught.value)

    def broken() -> Iterator[Any]:
        yield FLAT[2]
        raise ConnectionError("connection reset")

    hub["me/mine", "train"] = broken()
    with pytest.raises(DatasetError, match="connection reset"):
        list(read_examples("hf:me/mine"))


def test_without_a_network_the_hub_is_asked_once(
    hub: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def unreachable(_: object, hub_id: str, *, timeout: float) -> None:
        asked.append(hub_id)
        raise ConnectionError("no route to host")

    hub["me/mine", "train"] = FLAT
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(DatasetError, match=r"the hub cannot be reached \[hf:me/mine\]. Check the connection"):
        list(read_examples("hf:me/mine"))
    assert asked == ["me/mine"]


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_hub_is_an_immediate_error(
    hub: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    hub["rajpurkar/squad", "train"] = FLAT
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DatasetError, match=f"disabled by {variable}") as caught:
        read_examples("squad")
    for way in ("squad/train.json.gz", "data=", "KV_MEMORY_DATA", f"Unset {variable}", "JSON lines"):
        assert way in str(caught.value)
    monkeypatch.setenv(variable, "0")
    assert len(list(read_examples("squad"))) == 2


def test_missing_library_error_says_how_to_install_it(
    hub: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"pip install 'kv-memory\[train\]'") as caught:
        read_examples("squad", data=tmp_path)
    assert str(tmp_path / "squad" / "train.json") in str(caught.value)


def test_set_not_available_from_the_hub_is_reported(hub: dict[tuple[str, str], Any]) -> None:
    with pytest.raises(DatasetError, match="not available from the hub"):
        read_examples("squality")


@pytest.mark.parametrize(("name", "split", "other"), [("dolly", "dev", "train"), ("quality", "train", "dev")])
def test_missing_split_is_reported(name: str, split: Any, other: str) -> None:
    with pytest.raises(DatasetError, match=f"only has the split '{other}'"):
        read_examples(name, split=split)


def test_missing_path_error_names_all_known_sets() -> None:
    with pytest.raises(DatasetError, match="no such file or folder") as caught:
        read_examples("sqaud")
    assert all(name in str(caught.value) for name in (*DATASETS, "hf:owner/name"))


def test_path_object_with_the_name_of_a_set_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("squad").mkdir()
    (Path("squad") / "a.txt").write_text("Not SQuAD.")
    assert [e.id for e in read_examples(Path("squad"))] == ["squad/a.txt"]
