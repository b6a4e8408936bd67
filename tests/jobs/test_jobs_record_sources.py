"""Sources that are many records each: JSON lines, Parquet, SQL, sets of the hub, document stores of LlamaIndex."""

from __future__ import annotations

import datetime
import json
import sqlite3
import sys
import types
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kv_memory.errors import BrokenLineError, DatasetError, EmptyDocumentError, KVMemoryError, UnreadableDocumentError
from kv_memory.jobs import JobSettings
from kv_memory.jobs.job_records import SourceItem
from kv_memory.jobs.sources import name_of, parse_sources
from tests.jobs.source_samples import read_all, sources_of, texts

# -- records -----------------------------------------------------------------------------------------------------------


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_json_lines_source(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "notes.jsonl",
        '{"id": "a", "text": "The first.\\r\\nLine.", "year": 1921, "tags": ["x"], "long": "' + "x" * 2000 + '"}',
        "",
        '{"text": "Without a name."}',
        '{"id": 7, "text": "Ünïcode."}',
    )
    for backwards in (False, True):
        found = read_all(sources_of(path), backwards=backwards)
        assert texts(found) == {"a": "The first.\nLine.", "notes.jsonl#3": "Without a name.", "7": "Ünïcode."}
    assert found["a"].document.metadata == {"year": 1921}
    assert str(found["a"].document.source_uri).endswith("notes.jsonl#0")


def test_custom_id_and_text_fields(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "n.ndjson", '{"url": "u", "body": "B", "id": 3}')
    found = read_all(sources_of(path, settings=JobSettings(memory={}, id_field="url", text_field="body")))
    assert texts(found) == {"u": "B"} and found["u"].document.metadata == {"id": 3}


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        ("{broken", BrokenLineError, "not a JSON object"),
        ("[1]", BrokenLineError, "not a JSON object: got list"),
        ('{"id": "b", "words": "x"}', UnreadableDocumentError, "no field 'text'"),
        ('{"id": "b", "text": 3}', UnreadableDocumentError, "expected text, got int"),
        ('{"id": "b", "text": "  "}', EmptyDocumentError, "white space"),
    ],
)
def test_invalid_line_fails_without_affecting_others(
    tmp_path: Path, line: str, kind: type[KVMemoryError], said: str
) -> None:
    sources = sources_of(write_lines(tmp_path / "n.jsonl", line, '{"id": "good", "text": "Good."}'))
    bad, good = sources.items()
    with pytest.raises(kind, match=said):
        sources.read(bad)
    assert sources.read(good).document.text == "Good."


def test_file_changed_since_discovery_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "n.jsonl", '{"id": "a", "text": "A"}', '{"id": "b", "text": "B"}')
    _, second = sources_of(path).items()
    write_lines(path, '{"id": "a", "text": "A"}', '{"id": "c", "text": "C"}')
    with pytest.raises(UnreadableDocumentError, match="has changed"):
        sources_of(path).read(second)


def test_patterns_match_record_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", '{"id": "a", "text": "A"}')
    write_lines(tmp_path / "y.jsonl", '{"id": "b", "text": "B"}')
    for sources in (sources_of(tmp_path / "*.jsonl"), sources_of(tmp_path, glob="*.jsonl")):
        assert texts(read_all(sources)) == {"a": "A", "b": "B"}


def test_parquet_source(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    rows = 1500
    table = pa.table(
        {
            "id": [f"r{n}" for n in range(rows)],
            "text": [f"Row {n}." for n in range(rows)],
            "at": [datetime.date(2024, 1, 1)] * rows,
            "vector": [[0.5]] * rows,
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=700)
    sources = sources_of(tmp_path / "t.parquet")
    items = list(sources.items())
    assert len(items) == rows and items[-1].uri.endswith("t.parquet#2/99")
    for number in (0, 1, 699, 700, 1499, 3, 2, 1000, 1001):  # forwards, backwards, over groups
        read = sources.read(items[number])
        assert (read.document.id, read.document.text) == (f"r{number}", f"Row {number}.")
    assert read.document.metadata == {"at": "2024-01-01"}
    sources.close()
    (failed,) = sources_of(tmp_path / "t.parquet", settings=JobSettings(memory={}, text_field="body")).items()
    assert failed.error is not None and "the columns are id, text" in str(failed.error["next_step"])


def test_parquet_without_ids_and_invalid_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    parquet.write_table(pa.table({"text": ["A", "B"]}), tmp_path / "t.parquet")
    (tmp_path / "broken.parquet").write_text("PAR1 it is not")
    found = {item.document_id: item for item in sources_of(tmp_path / "*.parquet").items()}
    assert sorted(found) == [str(tmp_path / "broken.parquet"), "t.parquet#1", "t.parquet#2"]
    error = found[str(tmp_path / "broken.parquet")].error
    assert error is not None and "not a readable Parquet file" in str(error["what"])


def test_missing_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (item,) = sources_of(tmp_path / "t.parquet").items()
    assert item.error is not None and "kv-memory[jobs]" in str(item.error["next_step"])


@pytest.fixture
def database(tmp_path: Path) -> str:
    with closing(sqlite3.connect(tmp_path / "n.db")) as connection, connection:
        connection.execute('CREATE TABLE notes (key INTEGER PRIMARY KEY, "the text" TEXT, kind TEXT, year REAL)')
        connection.executemany(
            "INSERT INTO notes VALUES (?, ?, ?, 1.5)", [(n, f"Note {n}.", "ab"[n % 2]) for n in range(9)]
        )
    return f"sql:sqlite:///{tmp_path / 'n.db'}"


def test_sql_source(database: str) -> None:
    settings = JobSettings(memory={}, id_field="key", text_field="the text")
    query = "SELECT * FROM notes WHERE kind = 'b';"
    sources = sources_of(database, query=query, settings=settings)
    found = read_all(sources, backwards=True)
    assert texts(found) == {str(n): f"Note {n}." for n in (1, 3, 5, 7)}
    assert found["3"].document.metadata == {"kind": "b", "year": 1.5}
    assert found["3"].document.source_uri == "sql:0#3"
    gone = SourceItem(document_id="99", uri="sql:0#99")
    with pytest.raises(UnreadableDocumentError, match="has changed"):
        sources.read(gone)
    sources.close()


def test_failing_query_is_reported(database: str) -> None:
    (item,) = sources_of(database, query="SELECT id, text FROM nowhere").items()
    assert item.error is not None and "no such table" in str(item.error["what"])


def test_source_name_hides_the_password() -> None:
    (spec,) = parse_sources(["sql:postgresql://me:secret@db/x"], query="SELECT 1")
    assert name_of(spec) == "sql:postgresql://me:***@db/x"


class Rows:
    """What the `datasets` library gives, as far as it is used."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[number]

    def select_columns(self, names: list[str]) -> Rows:
        return Rows([{name: row[name] for name in names} for row in self.rows])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, config: str | None, *, split: str) -> Rows:
        asked.append((path, config, split))
        if path == "a/gone":
            raise ValueError("404: not there.\nMore.")
        return Rows([{"id": f"q{n}", "text": f"Row {n}."} for n in range(5)])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    yield asked


def test_hub_source(hub: list[tuple[Any, ...]]) -> None:
    found = read_all(sources_of("hub:a/b:validation"), backwards=True)
    assert texts(found) == {f"q{n}": f"Row {n}." for n in range(5)}
    assert found["q2"].document.source_uri == "hub:a/b:validation#2"
    assert set(hub) == {("a/b", None, "validation")}
    list(sources_of("hub:a/b").items())
    list(sources_of("hub:a/b:en:test").items())
    assert hub[-2:] == [("a/b", None, "train"), ("a/b", "en", "test")]
    unnamed = sources_of("hub:a/b", settings=JobSettings(memory={}, id_field="key"))
    assert [item.document_id for item in unnamed.items()][:2] == ["a/b#0", "a/b#1"]


def test_unknown_hub_set_is_reported(hub: list[tuple[Any, ...]]) -> None:
    (item,) = sources_of("hub:a/gone").items()
    assert item.error is not None
    assert (item.error["error"], item.error["where"]) == ("DatasetError", "hub:a/gone")
    assert item.error["what"] == "cannot be read from the hub: 404: not there"


def test_missing_datasets_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"kv-memory\[train\]"):
        sources_of("hub:a/b").read(SourceItem(document_id="a/b#0", uri="hub:a/b#0"))


# -- document stores of LlamaIndex -------------------------------------------------------------------------------------


@pytest.fixture
def docstore(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    core = pytest.importorskip("llama_index.core")
    from llama_index.core.node_parser import SentenceSplitter
    from llama_index.core.storage.docstore import SimpleDocumentStore

    made = [
        core.Document(
            id_=f"doc{n}",
            text=f'The "ferry" {n} \\ leaves {{at}} [7.40]. ' * 40,
            metadata={"file": f"{n}.md", "hidden": "x"},
            excluded_llm_metadata_keys=["hidden"],
        )
        for n in range(3)
    ]
    nodes = SentenceSplitter(chunk_size=128, chunk_overlap=0).get_nodes_from_documents(made)
    nodes[0].embedding = [0.25] * 300
    store = SimpleDocumentStore()
    store.add_documents([*nodes, core.Document(id_="loose", text="A document that nobody has cut.")])
    store.add_documents([core.schema.ImageNode(id_="picture", image="aGk=")])
    store.persist(str(tmp_path / "docstore.json"))
    from llama_index.core.schema import MetadataMode

    return tmp_path / "docstore.json", {node.node_id: node.get_content(MetadataMode.LLM) for node in nodes}


def test_docstore_source(docstore: tuple[Path, dict[str, Any]]) -> None:
    path, expected = docstore
    found = read_all(sources_of(path), backwards=True)
    assert texts(found) == {**expected, "loose": "A document that nobody has cut."}
    assert {id_ for id_, read in found.items() if not read.whole} == {"loose"}
    node = found[next(iter(expected))].document
    assert node.metadata["ref_doc_id"] == "doc0" and node.metadata["file"] == "0.md"


def test_indented_docstore_with_other_members_and_braces_in_strings(docstore: tuple[Path, dict[str, Any]]) -> None:
    path, expected = docstore
    whole = {"docstore/ref_doc_info": {"a": {"node_ids": ["{", '"}']}}, **json.loads(path.read_text())}
    path.write_text(json.dumps(whole, indent=3, ensure_ascii=False))
    assert texts(read_all(sources_of(path))).items() >= expected.items()


def test_truncated_or_changed_docstore_is_refused(docstore: tuple[Path, dict[str, Any]]) -> None:
    path, _ = docstore
    whole = path.read_bytes()
    items = list(sources_of(path).items())
    path.write_bytes(whole[: len(whole) // 2])
    *_, last = sources_of(path).items()
    assert last.error is not None and "not a LlamaIndex document store" in str(last.error["what"])
    with pytest.raises(UnreadableDocumentError, match="has changed"):
        sources_of(path).read(items[-1])
