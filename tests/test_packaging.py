"""The project's files say the same things: version, packages, dependencies, errors."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kv_memory

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

# Import names whose distribution is called differently.
DISTRIBUTIONS = {"bs4": "beautifulsoup4", "llama_index": "llama-index-core"}


def shipped_files() -> set[str]:
    """Every file of the package as it is named in a wheel."""
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kv_memory").rglob("*") if p.is_file()}
    files |= {f"kv_memory/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "integrations").rglob("*") if p.is_file()}
    return {f for f in files if "__pycache__" not in f}


def test_version_is_the_same_everywhere() -> None:
    assert kv_memory.__version__ == PROJECT["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[Unreleased\]$", changelog, re.MULTILINE)


def test_every_package_is_listed() -> None:
    on_disk = {str(Path(f).parent).replace("/", ".") for f in shipped_files() if f.endswith("/__init__.py")}
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    assert on_disk == listed, f"[tool.setuptools] packages lacks {on_disk - listed}, has in excess {listed - on_disk}"


def test_every_import_is_a_declared_dependency() -> None:
    requirements = [*PROJECT["dependencies"], *(r for e in PROJECT["optional-dependencies"].values() for r in e)]
    declared = {re.split(r"[\[<>=!~; ]", r)[0].lower() for r in requirements}
    missing: dict[str, str] = {}
    for path in [*ROOT.glob("kv_memory/**/*.py"), *ROOT.glob("integrations/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for top in {n.split(".")[0] for n in names} - sys.stdlib_module_names - {"kv_memory"}:
                if DISTRIBUTIONS.get(top, top).replace("_", "-").lower() not in declared:
                    missing[top] = str(path.relative_to(ROOT))
    assert not missing, f"imported, but neither a dependency nor an extra in pyproject.toml: {missing}"


def test_error_tree_in_the_docstring_is_the_class_tree() -> None:
    """Each line of the drawing names a class below the one its indentation says, and none is left out."""
    drawn: dict[str, str | None] = {}
    open_at: list[str] = []
    for line in (kv_memory.errors.__doc__ or "").split("```")[1].strip().splitlines():
        match = re.match(r"((?:│   |    )*(?:[├└]── )?)(\w+)", line)
        assert match, line
        depth, name = len(match[1]) // 4, match[2]
        drawn[name] = open_at[depth - 1] if depth else None
        open_at[depth:] = [name]
    real = {
        name: next((b.__name__ for b in cls.__bases__ if b.__module__ == cls.__module__), None)
        for name, cls in vars(kv_memory.errors).items()
        if isinstance(cls, type) and issubclass(cls, Exception)
    }
    assert drawn == real


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 80


def test_the_license_file_matches_the_metadata() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("target", ["setup", "lock", "demo", "test", "check", "oldest", "newest", "bench", "help"])
def test_make_has_the_target(target: str) -> None:
    if not (make := shutil.which("make")):
        pytest.skip("make is not installed")
    done = subprocess.run([make, "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
