"""Imports: the contracts in pyproject.toml see wrong ones (`make check`), and a fresh process loads little."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kv_memory

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("kv_memory/**/*.py"), *ROOT.glob("integrations/**/*.py")])


def unsafe_calls(tree: ast.AST) -> list[tuple[int, str]]:
    """Uses of torch.load and torch.save, and `allow_pickle=True`."""
    aliases = {"torch"}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in aliases and node.attr in {"load", "save"}:
                found.append((node.lineno, f"torch.{node.attr}"))
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [(node.lineno, f"torch.{a.name}") for a in node.names if a.name in {"load", "save"}]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append((node.lineno, "allow_pickle"))
    return found


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT).as_posix()) for p in SOURCES])
def test_tensors_are_never_pickled(path: str) -> None:
    assert unsafe_calls(ast.parse((ROOT / path).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    ["import torch as t\nt.load('x')", "from torch import load", "import numpy\nnumpy.load('x', allow_pickle=True)"],
)
def test_the_check_finds_unsafe_loads(source: str) -> None:
    assert len(unsafe_calls(ast.parse(source))) == 1


def test_the_check_accepts_numpy_without_pickle() -> None:
    assert unsafe_calls(ast.parse("import numpy\nnumpy.load('x', allow_pickle=False)")) == []


@pytest.mark.parametrize(
    ("path", "line", "contract"),
    [
        ("kv_memory/store/metrics.py", "import torch", "The store handles tensors"),
        ("kv_memory/store/blobs/local.py", "from kv_memory.model.backbone import Backbone", "The store handles"),
        ("kv_memory/memory.py", "def late():\n    from kv_memory.cli import main", "Each layer"),
        ("kv_memory/jobs/engines/local.py", "import ray", "Ray is behind"),
        ("kv_memory/jobs/ledger.py", "import pickle", "Nothing is pickled"),
        ("integrations/llama_index/llm.py", "import torch", "No tensors"),
        ("kv_memory/cli/app.py", "import integrations", "does not know its integrations"),
    ],
)
def test_contracts_find_a_forbidden_import(tmp_path: Path, path: str, line: str, contract: str) -> None:
    for name in ("kv_memory", "integrations"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "adapters"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / path).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    broken = [text for text in done.stdout.splitlines() if "BROKEN" in text]
    assert done.returncode == 1 and len(broken) == 1 and contract in broken[0], done.stdout


@pytest.mark.parametrize("name", sorted(kv_memory._LAZY))
def test_a_public_name_is_the_object_of_its_module(name: str) -> None:
    value = getattr(kv_memory, name)
    assert value is getattr(importlib.import_module(kv_memory._LAZY[name]), name)
    assert name in kv_memory.__all__
    assert name in dir(kv_memory)


def test_public_names_are_the_errors_and_the_lazy_ones() -> None:
    raised = {name for name, each in vars(kv_memory.errors).items() if isinstance(each, type)}
    assert len(raised) == 31
    assert set(kv_memory.__all__) == {*raised, *kv_memory._LAZY, "__version__"}


def test_an_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'kv_memory' has no attribute 'KVMemroy'"):
        kv_memory.KVMemroy  # noqa: B018


def loaded_by(python: list[str], code: str) -> list[str]:
    """Those of the heavy libraries that a fresh process holds after `code`; warnings are errors there too."""
    heavy = ("torch", "transformers", "peft", "sqlalchemy", "numpy")
    script = f"import sys\n{code}\nprint('LOADED', *(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([*python, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("LOADED")[2].split()


def test_import_kv_memory_loads_no_heavy_library(python: list[str]) -> None:
    assert loaded_by(python, "import kv_memory") == []


def test_the_check_for_heavy_libraries_finds_torch(python: list[str]) -> None:
    assert "torch" in loaded_by(python, "import kv_memory; kv_memory.DistilledCache")


def test_help_loads_no_torch(python: list[str]) -> None:
    loaded = loaded_by(
        python,
        "from kv_memory.cli import main\n"
        "sys.argv = ['kv-memory', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code",
    )
    assert not {"torch", "transformers", "peft"} & set(loaded)
