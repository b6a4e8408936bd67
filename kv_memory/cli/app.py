"""The command `kv-memory`: its subcommands with their examples, and the setup of its process."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

import kv_memory
from kv_memory.cli.add import add
from kv_memory.cli.advise import advise_on
from kv_memory.cli.ask import ask, chat
from kv_memory.cli.demo import demo
from kv_memory.cli.documents import list_documents, remove, show
from kv_memory.cli.eval import evaluate_task, report
from kv_memory.cli.job import resume, run
from kv_memory.cli.job_ledger import cancel, list_jobs, show_job
from kv_memory.cli.models import models
from kv_memory.cli.output import FAILED, STOPPED, debugging
from kv_memory.cli.serve import create_key, list_keys, revoke_key, serve
from kv_memory.cli.store import budget, check, current, gc, init, pin, stats, unpin, upgrade
from kv_memory.cli.train import train
from kv_memory.cli.transfer import export, import_file

# In the order of the help.
COMMANDS: dict[str, Callable[..., None]] = {
    **{"add": add, "ask": ask, "chat": chat, "list": list_documents, "show": show, "remove": remove},
    **{"export": export, "import": import_file, "budget": budget, "pin": pin, "unpin": unpin},
    **{"check": check, "gc": gc, "stats": stats, "models": models, "train": train, "eval": evaluate_task},
    **{"advise": advise_on, "report": report, "demo": demo, "serve": serve},
    **{"keys create": create_key, "keys list": list_keys, "keys revoke": revoke_key},
    **{"db init": init, "db current": current, "db upgrade": upgrade},
    **{"job run": run, "job list": list_jobs, "job show": show_job, "job resume": resume, "job cancel": cancel},
}
EXAMPLES = """\
kv-memory add notes/ report.pdf
kv-memory add notes/ --model Qwen/Qwen2.5-1.5B-Instruct --keep-ratio 1/8
kv-memory add report.pdf --max-bytes 300KB
git log | kv-memory add - --id git-log
kv-memory ask "When does the ferry leave?"
kv-memory ask "Who wrote the report?" --top-k 3 --json
kv-memory chat
kv-memory chat < questions.txt
kv-memory list
kv-memory list --json --collection team-a
kv-memory show report.pdf
kv-memory show text-3f2a --json
kv-memory remove report.pdf
kv-memory remove notes/a.md notes/b.md
kv-memory remove report --purge
kv-memory export notes.tar
kv-memory export team-a.tar --collection team-a
kv-memory import notes.tar
kv-memory import notes.tar --collection copy --on-conflict replace
kv-memory budget --max-size 20GB --ttl 30d
kv-memory budget --json
kv-memory pin handbook.pdf
kv-memory unpin handbook.pdf
kv-memory check
kv-memory check --json
kv-memory gc
kv-memory stats
kv-memory stats --prometheus
KV_MEMORY_STORE=/data/memory kv-memory stats --json
kv-memory models
kv-memory models --prepare qwen-0.5b
kv-memory train runs/general --data squad --data dolly:0.5 --time-limit 14400 --set eval_every=250
kv-memory train runs/notes --corpus notes/ --init runs/general/adapter --steps 500
kv-memory train runs/general --config run.toml --dry-run
kv-memory eval squad --n-documents 20 --keep-ratio 1/4 --keep-ratio 1/8
kv-memory eval spans --set corpus=notes/ --set min_tokens=600 --out runs/spans
kv-memory eval squad --adapter runs/adapter --method full --method none --method adapter --json
kv-memory eval qa questions.jsonl --documents notes/ --keep-ratio 1/8
kv-memory advise notes/
kv-memory advise notes/ --model qwen-0.5b --max-kl 0.05 --n-passages 20 --json
kv-memory report runs/squad --to docs/figures
kv-memory report old=runs/a new=runs/b --json
kv-memory demo
kv-memory demo --docs notes/ --questions questions.txt
kv-memory demo --model Qwen/Qwen2.5-1.5B-Instruct --keep-ratio 1/4
kv-memory serve
kv-memory serve --port 8080 --collection notes
kv-memory serve --host 0.0.0.0 --max-tokens 1024
kv-memory keys create open-webui
kv-memory keys create importer --only team-a --write
kv-memory keys list
kv-memory keys revoke 3f2a9c01
kv-memory db init team --catalog postgresql+psycopg://kv@db.local/kv --blobs s3://caches/team --tier 50GB
kv-memory db current --store team
kv-memory db upgrade --store team
kv-memory job run notes/ 'reports/**/*.pdf' --workers 4
kv-memory job run pages.jsonl --id-field url --text-field body --json
kv-memory job run --sync notes/ --collection notes
kv-memory job list
kv-memory job list --json
kv-memory job show nightly
kv-memory job show nightly --failed
kv-memory job resume
kv-memory job resume nightly --retry-failed --workers 2
kv-memory job cancel nightly
""".splitlines()


def examples_of(name: str) -> list[str]:
    """The examples of a command."""
    return [line for line in EXAMPLES if f"kv-memory {name} " in f"{line} "]


def _epilog(lines: list[str]) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)  # \b keeps click from joining the lines


# Without Rich's panels: they break examples on a narrow terminal, and text in brackets would be markup.
app = typer.Typer(
    name="kv-memory",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_epilog(["kv-memory demo", "kv-memory add notes/", 'kv-memory ask "When does the ferry leave?"']),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kv-memory {kv_memory.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress documents once into distilled key-value caches, and answer questions from those.

    Documents go into a store, which is a folder: ./kv-memory-store, unless --store or KV_MEMORY_STORE names another
    one. The store remembers the model settings given to add.

    Exit codes: 0 done, 1 failed (or check found damage), 2 wrong usage, 130 stopped with Ctrl-C. KV_MEMORY_DEBUG=1
    prints the traceback of an error.
    """


_db = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
app.add_typer(_db, name="db", help="Create a store in PostgreSQL and an object store, or upgrade its tables.")
_keys = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
app.add_typer(_keys, name="keys", help="Create, list and revoke the keys of the server's clients.")
_job = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
app.add_typer(_job, name="job", help="Compress many documents in worker processes, and resume after any crash.")
for _name, _function in COMMANDS.items():
    _group, _, _short = _name.rpartition(" ")
    {"": app, "db": _db, "keys": _keys, "job": _job}[_group].command(_short, epilog=_epilog(examples_of(_name)))(
        _function
    )


def main() -> None:
    """Run the command line of this process and exit."""
    _keep_libraries_quiet()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character should not end the command
    try:
        app(prog_name="kv-memory")
    except KeyboardInterrupt:  # before a command began; later ones are handled in `reporting`
        print("Stopped.", file=sys.stderr)
        sys.exit(STOPPED)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # `kv-memory list | head`: otherwise Python would complain when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILED)


def _keep_libraries_quiet() -> None:
    """Silence libraries, so that the terminal shows only this package's messages.

    This is done here and not in `app`, so that tests see every warning.
    """
    if debugging():
        return
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",  # otherwise it warns when a process forks
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:  # -W and PYTHONWARNINGS take precedence
        warnings.simplefilter("ignore")
        # Deprecated calls by this package stay visible. Those of a model's forward are attributed to torch's Module.
        warnings.filterwarnings("default", module=r"kv_memory\b|torch\.nn\.modules\.module$")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("Note: %(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler])
    logging.getLogger("kv_memory").setLevel(logging.WARNING)
