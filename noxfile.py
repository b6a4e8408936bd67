"""The integrations' tests against the oldest and the newest release of each framework that they support.

    make frameworks                     # both
    .venv/bin/nox -s newest -- -k llama # one of them, with arguments for pytest

nox, not tox: the matrix is two lists, and Python says that best. Each session has an environment of its own, so the
first run installs torch twice (constraints.txt pins it).
"""

from __future__ import annotations

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"

# The lower bounds of pyproject.toml.
# aiohttp 3.14 dropped a class that langchain-tests 1.0.0, through its vcrpy, imports.
OLDEST = ["llama-index-core==0.14.0", "langchain-core==1.0.0", "langchain-tests==1.0.0", "langgraph==1.0.0"]
OLDEST += ["aiohttp<3.14"]
NEWEST = ["llama-index-core<0.15", "langchain-core<2", "langchain-tests<2", "langgraph<2"]


@nox.session
def oldest(session: nox.Session) -> None:
    """The oldest supported releases."""
    # They warn of what was deprecated since in the libraries below them, which is not ours to mend.
    run(session, OLDEST, "-W", "default")


@nox.session
def newest(session: nox.Session) -> None:
    """The newest supported releases."""
    run(session, ["--upgrade", "--upgrade-strategy=eager", *NEWEST])


def run(session: nox.Session, frameworks: list[str], *arguments: str) -> None:
    """Install and test; arguments behind `--` go to pytest."""
    tools = ["pytest", "pytest-asyncio>=1", "hypothesis", "nbclient", "ipykernel", "langchain-text-splitters"]
    session.install("-c", "constraints.txt", "-e", ".[embedded,structured]", *tools, *frameworks)
    session.run("python", "-m", "pip", "list", "--format=freeze", silent=True)
    session.run(
        "python", "-m", "pytest", "tests/integrations", *arguments, *session.posargs, env={"HF_HUB_OFFLINE": "1"}
    )
