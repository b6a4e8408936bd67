"""The wheel: what it holds, and what a user gets who installs it and nothing else.

The clean environment has the wheel, and of this environment's packages those that the wheel asks for, directly or in
turn. They are linked, not downloaded, so the test needs no network, and the versions are those of the lock.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from importlib.metadata import Distribution, distribution
from importlib.util import cache_from_source
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kv_memory.model.embedded import BUILT_IN
from tests.documents.test_parsers import make_pdf
from tests.test_packaging import PROJECT, ROOT, shipped_files

needs_model = pytest.mark.skipif(not BUILT_IN["smollm2"].is_prepared, reason="smollm2 is not prepared (`make setup`)")


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build in place would leave folders behind, and take up files of an older one."""
    source = tmp_path_factory.mktemp("source")
    for name in ("kv_memory", "integrations", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    # What a run leaves behind must not be shipped.
    (source / "kv_memory/__pycache__").mkdir()
    (source / "kv_memory/__pycache__/stale.cpython-311.pyc").write_bytes(b"stale")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run([*command, "-w", out, source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheel_file) as opened:
        yield opened


# What it holds


def test_the_wheel_contains_exactly_the_shipped_files(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == shipped_files()
    assert {"kv_memory/py.typed", "kv_memory/integrations/__init__.py"} <= held
    assert {name.split("/")[0] for name in held} == {"kv_memory"}  # no top-level integrations, no tests


def test_the_wheel_contains_the_migrations(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    assert "kv_memory/store/sql/migrations/env.py" in held
    assert any(name.startswith("kv_memory/store/sql/migrations/versions/") for name in held)


def test_the_wheel_declares_its_command_license_and_extras(wheel: zipfile.ZipFile) -> None:
    info = f"kv_memory-{PROJECT['version']}.dist-info"
    assert "kv-memory = kv_memory.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    for extra in PROJECT["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in metadata


# What it needs


def needed(wheel: zipfile.ZipFile) -> dict[str, Distribution]:
    """The packages that the wheel asks for without an extra, and what these ask for, by name."""
    metadata = message_from_bytes(wheel.read(f"kv_memory-{PROJECT['version']}.dist-info/METADATA"))
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    asked = [(Requirement(line), "") for line in metadata.get_all("Requires-Dist", [])]
    while asked:
        requirement, extra = asked.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.setdefault(name, distribution(name))
        for wanted in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, wanted))
            asked += [(Requirement(line), wanted) for line in found[name].requires or []]
    return found


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@pytest.fixture(scope="module")
def clean(wheel_file: Path, wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the wheel, what it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, symlinks=os.name == "posix")
    (site,) = folder.glob("lib/python*/site-packages")
    for package in needed(wheel).values():
        for file in package.files or []:
            if ".." in file.parts or file.suffix == ".pyc" or (site / file).exists():  # two packages may share one
                continue
            source = str(package.locate_file(file))
            # With its byte code, or each process would compile torch again where none may be written.
            compiled = cache_from_source(source) if file.suffix == ".py" else ""
            for path in (source, compiled):
                if os.path.exists(path):
                    target = site / os.path.relpath(path, package.locate_file(""))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    link_or_copy(path, str(target))
    install = [sys.executable, "-m", "pip", f"--python={folder / 'bin/python'}", "install", "-q", "--no-index"]
    done = subprocess.run([*install, "--no-deps", wheel_file], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process with Python's default warning filters, and no terminal."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_dependencies_are_complete_without_dev_tools(clean: Path, tmp_path: Path) -> None:
    checked = run(sys.executable, "-m", "pip", f"--python={clean / 'python'}", "check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    assert "No module named 'pytest'" in run(clean / "python", "-c", "import pytest", cwd=tmp_path).stderr


FILES = {
    "note.txt": b"The ferry leaves at seven.",
    "note.md": b"# Ferry\n\nThe ferry leaves at seven.",
    "note.rst": b"Ferry\n=====\n\nThe ferry leaves at seven.",
    "note.html": b"<title>Ferry</title><p>The ferry leaves at seven.</p>",
    "plain.pdf": make_pdf("The ferry leaves at seven."),
    "aes.pdf": make_pdf("The ferry leaves at seven.", password="", cipher="AES-256"),
}


@pytest.mark.slow
def test_the_installed_package_reads_every_format(clean: Path, tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    script = "import sys; from kv_memory.documents import read_file\nfor n in sys.argv[1:]: print(n, read_file(n).text)"
    done = run(clean / "python", "-c", script, *FILES, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("The ferry leaves at seven.") == len(FILES)


# What a user sees. Standard error holds our own words only: each pattern is a line that this package writes.

PROGRESS = (
    r"[\d,]+/[\d,]+ tokens(, [\d,]+ tokens/s)?, document \d+ of \d+: .*|"
    r"1 passage of 1 document to compress, \d+ tokens: about \S+ kB on disk for \d+ bytes of text .*"
)
JOB = (
    r"Job \S+ started: .*|Looking for documents|Nothing to compress|\d+ documents? to do; the model is being loaded|"
    r"\d+/\d+ documents.*"
)


@pytest.mark.slow
@needs_model
def test_commands_print_no_foreign_output(clean: Path, tmp_path: Path) -> None:
    (tmp_path / "ferry.md").write_text("The captain of the ferry to Skarholm is Agnes Holm.")
    (tmp_path / "lamp.md").write_text("The lamp of the lighthouse burned whale oil until 1921.")
    for arguments, out, err in [
        (["--help"], "compressed", ""),
        (["add", "ferry.md", "--model", "smollm2"], "1 added", PROGRESS),
        (["ask", "Who is the captain of the ferry?"], "Agnes Holm", ""),
        (["list"], "ferry.md", ""),
        (["job", "run", "lamp.md"], "1 added", JOB),
    ]:
        done = run(clean / "kv-memory", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert out in done.stdout
        assert [line for line in done.stderr.splitlines() if not re.fullmatch(err, line)] == []


@pytest.mark.slow
@needs_model
def test_the_demo_prints_no_foreign_output(clean: Path, tmp_path: Path) -> None:
    done = run(clean / "kv-memory", "demo", "--model", "smollm2", "--limit", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Distilled" in done.stdout
    assert [line for line in done.stderr.splitlines() if not re.fullmatch(PROGRESS, line)] == []


@pytest.mark.slow
@needs_model
def test_the_readme_example_prints_only_its_answers(clean: Path, tmp_path: Path, only_smollm2: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "example.py").write_text(readme.split("```python\n")[1].split("```")[0])
    done = run(clean / "python", "example.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, only_smollm2)
    assert "Ida Brandt" in done.stdout
