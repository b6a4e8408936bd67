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

# The lower bounds of pyproject.toml; where a later release is named, the first ones do not install with what we need.
OLDEST = ["llama-index-core==0.14.0", "langchain-core==1.0.0", "langchain-tests==1.0.0", "langgraph==1.0.0"]
NEWEST = ["llama-index-core<0.15", "langchain-core<2", "langchain-tests<2", "langgraph<2"]


@nox.session
def oldest(session: nox.Session) -> None:
    """The oldest supported releases."""
    run(session, OLDEST)


@nox.session
def newest(session: nox.Session) -> None:
    """The newest supported releases."""
    run(session, ["--upgrade", "--upgrade-strategy=eager", *NEWEST])


def run(session: nox.Session, frameworks: list[str]) -> None:
    """Install and test; arguments behind `--` go to pytest."""
    tools = ["pytest", "pytest-asyncio>=1", "hypothesis", "nbclient", "ipykernel", "langchain-text-splitters"]
    session.install("-c", "constraints.txt", "-e", ".[embedded,structured]", *tools, *frameworks)
    session.run("python", "-m", "pip", "list", "--format=freeze", silent=True)
    session.run(
        "python", "-m", "pytest", "tests/integrations", *session.posargs, env={"HF_HUB_OFFLINE": "1"}, success_codes=[0]
    )
