"""Runs the tests' scripts, each in a forked process: importing torch for each would take most of the tests' time.

Reads one JSON job a line (`code`, `args`, `output`: two files, `env`), answers with the exit status.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import store_samples

from kv_memory import errors


def run(code: str, args: list[str], output: list[str], env: dict[str, str]) -> int:
    os.environ.update(env)
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["script", *args]
    names = {"os": os, "signal": signal, "sys": sys, "time": time, "Path": Path}
    names |= {key: value for key, value in {**vars(errors), **vars(store_samples)}.items() if key[0] != "_"}
    try:
        exec(compile(code, "<script>", "exec"), names)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:  # a single job, for a script that needs a process started in its own way
        job = json.loads(sys.argv[1])
        sys.exit(run(**job))
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
