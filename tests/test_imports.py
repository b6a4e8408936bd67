"""Who may import whom, read from the source of every module; and what a fresh process loads."""

from __future__ import annotations

import ast
import graphlib
import importlib
import subprocess
from pathlib import Path

import pytest

import kv_memory

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("kv_memory/**/*.py"), *ROOT.glob("integrations/**/*.py")])

# A unit is a module or folder directly below kv_memory. Each may import itself and what its line names:
#   errors, config ◄ cache, rope, attention, prompts, embedded ◄ loading ◄ backbone ◄ compress, generate ◄ train
#   cache, embedded ◄ store;   store, documents, intake ◄ jobs;   documents, words ◄ retrieve: errors and config alone;
#   memory joins both sides.
_TENSORS = {
    "errors",
    "config",
    "fingerprint",
    "keep",
    "quantize",
    "cache",
    "rope",
    "positioned",
    "attention",
    "prefix",
    "prompts",
    "opening",
}
_STORE = {"tracing", "errors", "config", "embedded", "fingerprint", "cache", "keep", "terms"}
_BELOW_MEMORY = {
    *_TENSORS,
    "tracing",
    "embedded",
    "loading",
    "backbone",
    "compress",
    "generate",
    "train",
    "store",
    "jobs",
    "documents",
    "datasets",
    "words",
    "terms",
    "retrieve",
    "settings",
    "answers",
    "assembly",
    "prepare",
    "intake",
    "reader",
    "finder",
}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "tracing": set(),
    "config": {"errors"},
    "fingerprint": {"errors"},
    "keep": {"errors", "config", "fingerprint"},
    "terms": {"errors"},
    "quantize": {"errors"},
    "cache": {"errors", "config", "fingerprint", "quantize"},
    "rope": {"errors", "config"},
    "positioned": {"errors", "config", "rope"},
    "attention": {"errors", "config", "positioned"},
    "prefix": {"errors", "config"},
    "prompts": {"errors", "config"},
    "opening": {"errors", "config"},
    "embedded": {"errors", "config"},
    "weights": {"errors", "config", "embedded"},
    "loading": {"errors", "config", "embedded"},
    "backbone": {*_TENSORS, "embedded", "loading"},
    "compress": {*_TENSORS, "embedded", "backbone"},
    "generate": {*_TENSORS, "backbone"},
    "train": {*_TENSORS, "embedded", "backbone", "compress", "generate", "datasets", "documents"},
    "store": _STORE,
    "jobs": {*_STORE, "store", "documents", "settings", "assembly", "intake"},
    "documents": {"errors", "config"},
    "datasets": {"errors", "config", "documents", "words"},
    "words": {"errors", "config"},
    "retrieve": {"errors", "config", "words", "terms"},
    "settings": {"errors", "config", "embedded", "keep", "prompts"},
    "assembly": {*_TENSORS, "embedded", "backbone", "compress", "settings", "store"},
    "reader": {*_TENSORS, *_STORE, "compress", "generate", "store"},
    "finder": {*_STORE, "retrieve", "store"},
    "answers": {"errors", "config", "generate", "reader", "retrieve", "store"},
    "prepare": {"errors", "config", "documents", "words", *_STORE, "store"},
    "intake": {*_TENSORS, *_STORE, "backbone", "compress", "documents", "prepare", "store"},
    "memory": _BELOW_MEMORY,
    "conversation": {*_BELOW_MEMORY, "memory"},
    "evaluate": {*_BELOW_MEMORY, "memory"},
    "inspect": {*_BELOW_MEMORY, "memory"},
    "integrations": {*_BELOW_MEMORY, "memory", "conversation"},
    "cli": {*_BELOW_MEMORY, "memory", "evaluate", "inspect", "weights"},
}

# Libraries that a unit never imports itself. `store` reads tensors through kv_memory.cache.
_MODELS = {"torch", "transformers", "peft", "safetensors"}
_SQL = {"sqlalchemy", "alembic"}
NEVER_IMPORTS: dict[str, set[str]] = {
    "errors": {*_MODELS, *_SQL},
    "config": {*_MODELS, *_SQL},
    "backbone": _SQL,
    "compress": _SQL,
    "generate": _SQL,
    "train": _SQL,
    "store": {"torch", "transformers", "peft"},
    "documents": {*_MODELS, *_SQL},
    "datasets": {*_MODELS, *_SQL},
    "integrations": {*_MODELS, *_SQL},
}
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RAY_MODULE = "kv_memory/jobs/ray.py"


def name_of(path: str) -> list[str]:
    """`kv_memory/store/blobs.py` -> [kv_memory, store, blobs]; integrations/ under the name it is installed by."""
    parts = list(Path(path).with_suffix("").parts)
    return parts if parts[0] == "kv_memory" else ["kv_memory", *parts]


def imported(path: str, tree: ast.AST) -> list[tuple[int, str]]:
    """Every module a source imports, anywhere in it, with the line: `from a import b` gives `a.b`."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = name_of(path)[: -node.level] if node.level else []  # __init__ counts as a part, so one level fits it
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                found.append((node.lineno, str(node.args[0].value)))
    return found


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


def violations(path: str, source: str) -> list[str]:
    """What is wrong with a module's imports, one line each."""
    tree = ast.parse(source)
    unit = name_of(path)[1]
    is_facade = unit == "__init__"  # kv_memory/__init__.py names everything, lazily
    if not is_facade and unit != "__main__" and unit not in MAY_IMPORT:
        return [f"{path}: no line for {unit!r} in MAY_IMPORT of tests/test_imports.py; say there what it may import"]
    may = set(MAY_IMPORT) if is_facade else {"cli"} if unit == "__main__" else {*MAY_IMPORT[unit], unit}
    problems = [f"{path}:{line}: {name} unpickles or pickles; use safetensors" for line, name in unsafe_calls(tree)]
    for line, name in imported(path, tree):
        parts = name.split(".")
        if parts[0] == "integrations":
            problems.append(f"{path}:{line}: integrations is installed as kv_memory.integrations; import it relatively")
        elif parts[0] == "kv_memory":
            target = parts[1] if len(parts) > 1 else "__init__"
            # A public name taken from the package itself is an import of the unit that defines it.
            target = kv_memory._LAZY[target].split(".")[1] if target in kv_memory._LAZY else target
            target = "errors" if target in vars(kv_memory.errors) else target
            if target in {"__init__", "__version__"}:
                continue
            if target not in MAY_IMPORT:
                problems.append(f"{path}:{line}: {target!r} is unknown; add it to MAY_IMPORT of tests/test_imports.py")
            elif target not in may:
                problems.append(
                    f"{path}:{line}: {unit} may not import {target}; see MAY_IMPORT of tests/test_imports.py"
                )
        elif parts[0] in PICKLERS:
            problems.append(f"{path}:{line}: {parts[0]} is pickle; nothing here may be unpickled")
        elif parts[0] == "ray" and path != RAY_MODULE:
            problems.append(f"{path}:{line}: only {RAY_MODULE} imports ray")
        elif parts[0] in NEVER_IMPORTS.get(unit, set()):
            problems.append(f"{path}:{line}: {unit} never imports {parts[0]}")
    return problems


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT).as_posix()) for p in SOURCES])
def test_module_imports_only_what_its_layer_may(path: str) -> None:
    problems = violations(path, (ROOT / path).read_text(encoding="utf-8"))
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kv_memory/store/blobs.py", "import torch"),
        ("kv_memory/store/catalog.py", "def f():\n    from transformers import AutoModel"),
        ("kv_memory/store/store.py", "from kv_memory.backbone import Backbone"),
        ("kv_memory/store/store.py", "from kv_memory import Backbone"),
        ("kv_memory/store/store.py", "from .. import backbone"),
        ("kv_memory/store/__init__.py", "from ..memory import KVMemory"),
        ("kv_memory/compress/refine.py", "from sqlalchemy.orm import Session"),
        ("kv_memory/cache.py", "import kv_memory.rope"),
        ("kv_memory/generate/decode.py", "import importlib\nimportlib.import_module('kv_memory.compress')"),
        ("kv_memory/documents.py", "from kv_memory.cache import DistilledCache"),
        ("kv_memory/jobs/local.py", "import ray.data"),
        ("kv_memory/errors.py", "from kv_memory.config import DecodeSettings"),
        ("kv_memory/memory.py", "from kv_memory.cli import main"),
        ("kv_memory/memory.py", "from kv_memory.telepathy import read"),
        ("kv_memory/telepathy.py", "x = 1"),
        ("kv_memory/cli/main.py", "from kv_memory.integrations.langchain import x"),
        ("kv_memory/cli/main.py", "import integrations"),
        ("kv_memory/jobs/ledger.py", "import pickle"),
        ("kv_memory/train/trainer.py", "import torch as t\nt.load('x')"),
        ("kv_memory/train/trainer.py", "from torch import load"),
        ("kv_memory/retrieve.py", "import numpy\nnumpy.load('x', allow_pickle=True)"),
        ("integrations/llama_index/engine.py", "import torch"),
    ],
)
def test_the_check_sees_a_wrong_import(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kv_memory/store/blobs.py", "from ..errors import StoreError\nfrom . import catalog\nimport sqlalchemy"),
        ("kv_memory/store/__init__.py", "from .catalog import Catalog\nfrom kv_memory import StoreError, __version__"),
        ("kv_memory/jobs/ray.py", "import ray\nfrom kv_memory.store import Store"),
        ("kv_memory/__main__.py", "from kv_memory.cli import main"),
        ("integrations/langchain/retriever.py", "from .. import common\nfrom kv_memory import KVMemory"),
        ("kv_memory/retrieve.py", "import numpy\nnumpy.load('x', allow_pickle=False)"),
    ],
)
def test_the_check_accepts_a_right_import(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_the_layers_have_no_circle() -> None:
    order = list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())
    assert set(order) == set(MAY_IMPORT)
    assert order[0] == "errors"


@pytest.mark.parametrize("name", sorted(kv_memory._LAZY))
def test_a_public_name_is_the_one_of_its_module(name: str) -> None:
    value = getattr(kv_memory, name)
    assert value is getattr(importlib.import_module(kv_memory._LAZY[name]), name)
    assert name in kv_memory.__all__
    assert name in dir(kv_memory)


def test_public_names_are_the_errors_and_the_lazy_ones() -> None:
    assert set(kv_memory.__all__) == {*kv_memory.errors.__all__, *kv_memory._LAZY, "__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
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


def test_the_check_for_heavy_libraries_sees_torch(python: list[str]) -> None:
    assert "torch" in loaded_by(python, "import kv_memory; kv_memory.DistilledCache")


def test_help_loads_no_torch(python: list[str]) -> None:
    loaded = loaded_by(
        python,
        "from kv_memory.cli import main\n"
        "sys.argv = ['kv-memory', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code",
    )
    assert not {"torch", "transformers", "peft"} & set(loaded)
