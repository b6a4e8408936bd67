"""`kv-memory` as a process: what it loads, its exit codes, its two streams, and Ctrl-C."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from kv_memory.cli import app
from kv_memory.cli.app import COMMANDS, EXAMPLES, examples_of
from tests.cli.ran import Ran

Start = Callable[..., "subprocess.Popen[str]"]
GROUPS = {
    "": "add ask chat list show remove export import budget pin unpin check gc stats models train eval advise report "
    "demo serve",
    "keys": "create list revoke",
    "db": "init current upgrade",
    "job": "run list show resume cancel",
}


def test_all_commands_are_registered_in_the_order_of_the_help() -> None:
    group: Any = typer.main.get_command(app)
    for name, commands in GROUPS.items():
        found = group.commands[name].commands if name else group.commands
        assert [each for each in found if each not in GROUPS] == commands.split()
    assert list(COMMANDS) == [
        f"{name} {each}".strip() for name, commands in GROUPS.items() for each in commands.split()
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples_that_are_valid_usage(kv: Callable[..., Ran], name: str) -> None:
    """The options of each example exist: parsed by the command itself, and not run."""
    done = kv(*name.split(), "--help")
    assert done.code == 0
    lines = [line.strip() for line in done.out.partition("Examples:\n")[2].strip().splitlines()]
    assert lines == examples_of(name) and 1 <= len(lines) <= 4
    assert "--json" in done.out
    command: Any = typer.main.get_command(app)
    for word in name.split():
        command = command.commands[word]
    for line in lines:
        words = shlex.split(line.split("| ")[-1].split(" < ")[0])
        given = words[words.index("kv-memory") + 1 + len(name.split()) :]
        assert command.make_context(name, given).params


def test_every_example_belongs_to_one_command() -> None:
    assert sorted(line for name in COMMANDS for line in examples_of(name)) == sorted(EXAMPLES)


def test_no_help_loads_a_model_library(python: list[str]) -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from kv_memory.cli import app\n"
        f"for name in {list(COMMANDS)!r}:\n"
        "    assert CliRunner().invoke(app, [*name.split(), '--help']).exit_code == 0\n"
        "print(*({'torch', 'transformers', 'peft', 'sqlalchemy'} & set(sys.modules)))"
    )
    done = subprocess.run([*python, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# What each prints is tested elsewhere; `{store}` has two documents.
WITHOUT_A_MODEL = [
    *(f"{name} --store {{store}}" for name in ("list", "stats", "show ferry", "check", "gc", "budget", "pin ferry")),
    *("export x.tar --store {store}", "import x.tar --store new", "remove light --store {store}", "models"),
    *("job list --store {store}", "job show nothing --store {store}", "job resume --store {store}", "db current"),
    *("ask q --store none", "ask q --collection none", "ask ''", "ask q --top-k x", "chat --store none"),
    *(
        "add",
        "add nothing.md",
        "add --stale --store none",
        "add . --keep-ratio 3",
        "add ''",
        "add - --id ''",
        "add . --encoding x",
    ),
    *("job run", "job run nothing.md", "job run . --name ''", "job run . --workers 0", "demo --limit 0", "advise ''"),
    *("advise nothing", "advise . --keep-ratio 3", "advise . --encoding x", "report ''", "train ''", "eval ''"),
]


@pytest.mark.slow
def test_commands_that_need_no_model_load_no_model_library(python: list[str], store: Path, tmp_path: Path) -> None:
    """Each in a process of its own, forked from one that has imported the command line only."""
    script = (
        "import io, os, shlex, sys\n"
        "from kv_memory.cli import app\n"
        f"for line in {WITHOUT_A_MODEL!r}:\n"
        "    if child := os.fork():\n"
        "        os.waitpid(child, 0)\n"
        "        continue\n"
        "    sys.stdin, sys.stderr = io.StringIO(), io.StringIO()\n"
        "    stdout, sys.stdout = sys.stdout, io.StringIO()\n"
        "    try:\n"
        f"        app(shlex.split(line.format(store={str(store)!r})))\n"
        "    except SystemExit as end:\n"
        "        found = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "        print(line, '->', end.code, *found, file=stdout, flush=True)\n"
        "    os._exit(0)"
    )
    done = subprocess.run([*python, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ended = dict(line.rsplit(" -> ", 1) for line in done.stdout.splitlines())
    assert list(ended) == WITHOUT_A_MODEL
    assert {line: end for line, end in ended.items() if end not in {"0", "1", "2"}} == {}
    assert {line for line, code in ended.items() if "''" in line and code != "2"} == set()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--version"], 0, ""),
        ([], 2, ""),
        (["fly"], 2, "No such command 'fly'"),
        (["ask"], 2, "Missing argument"),
        (["add", "x", "--wings"], 2, "No such option"),
        (["add", "nothing.md"], 1, "Error: no such file or folder\nWhere: nothing.md\nNext step: "),
        (["add", "-", "--keep-ratio", "3"], 2, "Error: keep_ratio must lie in (0, 1], got 3.0\n"),
    ],
)
def test_exit_codes(process: Start, tmp_path: Path, args: list[str], code: int, said: str) -> None:
    with process(*args, cwd=tmp_path) as ran:
        out, err = ran.communicate(timeout=60)
    assert ran.returncode == code, err
    assert said in err and "Traceback" not in err
    assert (out == "") is (code != 0)
    assert list(tmp_path.iterdir()) == []


def test_terminal_errors_are_red_and_debugging_prints_a_traceback(process: Start, tmp_path: Path) -> None:
    with process("add", "nothing.md", cwd=tmp_path, FORCE_COLOR="1", TERM="xterm", KV_MEMORY_DEBUG="1") as ran:
        _, err = ran.communicate(timeout=60)
    assert ran.returncode == 1
    assert "\x1b[1;31mError: \x1b[0m" in err
    assert "Traceback" in err and "UnreadableDocumentError" in err


def test_messages_of_libraries_are_silenced(process: Start, tmp_path: Path, store: Path) -> None:
    with process("ask", "When does the ferry leave?", "--json", cwd=tmp_path) as ran:
        out, err = ran.communicate(timeout=60)
    assert json.loads(out)["sources"]
    assert err == ""


@pytest.mark.parametrize(
    ("module", "is_shown"),
    [("kv_memory.model.backbone", True), ("torch.nn.modules.module", True), ("peft.peft_model", False)],
)
def test_only_warnings_of_own_calls_are_shown(module: str, is_shown: bool) -> None:
    script = (
        "import warnings\n"
        "from kv_memory.cli.app import _keep_libraries_quiet\n"
        "_keep_libraries_quiet()\n"
        f"warnings.warn_explicit('old name', FutureWarning, 'file.py', 1, module={module!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ("old name" in done.stderr) is is_shown


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_the_command_quietly(process: Start, tmp_path: Path, store: Path, unbuffered: str) -> None:
    with process("list", cwd=tmp_path, PYTHONUNBUFFERED=unbuffered) as ran:
        assert ran.stdout and ran.stderr
        ran.stdout.close()
        assert ran.stderr.read() == ""
    assert ran.returncode == 1


def test_ctrl_c_during_add_keeps_documents_and_the_next_run_resumes(
    process: Start, kv: Callable[..., Ran], tmp_path: Path, quick: list[str]
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(80):
        (notes / f"{number:03}.txt").write_text(f"Pier {number} has a ferry. " * 12)
    with process("add", "notes", *quick, cwd=tmp_path) as ran:
        assert ran.stderr
        assert "passages of 80 documents to compress" in ran.stderr.readline()
        assert "tokens/s" in ran.stderr.readline()  # the first passage is compressed
        time.sleep(0.4)
        ran.send_signal(signal.SIGINT)
        _, err = ran.communicate(timeout=60)
    assert ran.returncode == 130, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("Stopped. ") and last.endswith("stored; run the same command to resume.")
    n_stored, n_passages = map(int, re.findall(r"(\d+) (?:documents?|passages?)", last))
    assert n_stored < 80
    assert kv("stats", "--json").json["n_caches"] == n_passages  # also those of the document that was not finished
    report = kv("add", "notes", *quick, "--json").json
    assert report["n_passages"] == kv("stats", "--json").json["n_caches"] - n_passages
    assert len(report["unchanged"]) == n_stored and len(report["added"]) == 80 - n_stored
