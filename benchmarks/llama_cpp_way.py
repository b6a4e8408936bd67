"""The ways of llama.cpp in `others.py`, for an environment with llama-cpp-python; nothing of kv-memory is imported.

    python llama_cpp_way.py llama_text|llama_state MODEL.gguf FOLDER THREADS MAX_TOKENS

Token ids come from `FOLDER/work.json`, so prompts are those of the other ways. Every answer begins with the shared
prefix in memory, as there. Prints one JSON object: `answered`, for each question the seconds to its first token and to
its last and the token ids, and `made`, seconds and bytes a document.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def main() -> None:
    """Answer all questions one way."""
    way, gguf, folder, threads, most = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    work = json.loads((folder / "work.json").read_text())
    prefix, pages, ends = work["prefix"], work["pages"], set(work["end_ids"])
    longest = max(len(page["document"]) + len(page["question"]) for page in pages)
    context = len(prefix) + longest + most + 8
    model = llama_cpp.Llama(gguf, n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    model.eval(prefix)
    answered, make_s, sizes = [], [], []
    for index, page in enumerate(pages):
        path = folder / f"llama-{index}.state"
        if way == "llama_state":
            begin_s = time.perf_counter()
            rewind(model, len(prefix))
            model.eval(page["document"])
            save(model, path)
            make_s.append(time.perf_counter() - begin_s)
            sizes.append(path.stat().st_size)
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        rewind(model, len(prefix))
        begin_s = time.perf_counter()
        if way == "llama_state":
            load(model, path, [*prefix, *page["document"]])
            model.eval(page["question"])
        else:
            model.eval([*page["document"], *page["question"]])
        ids, first_s = [pick(model)], time.perf_counter() - begin_s
        while ids[-1] not in ends and len(ids) < most:
            model.eval(ids[-1:])
            ids.append(pick(model))
        answered.append((first_s, time.perf_counter() - begin_s, ids))
    made = {"make_s": 0.0, "size_bytes": statistics.mean(len(page["text"].encode()) for page in pages)}
    if way == "llama_state":
        made = {"make_s": statistics.mean(make_s), "size_bytes": statistics.mean(sizes)}
    json.dump({"answered": answered, "made": made}, sys.stdout)


def pick(model: Any) -> int:
    """The likeliest token; logits of the last token alone are kept."""
    row = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.ctypeslib.as_array(row, shape=(model.n_vocab(),)).argmax())


def rewind(model: Any, n_tokens: int) -> None:
    """Forget all but the first tokens."""
    model._ctx.kv_cache_seq_rm(-1, n_tokens, -1)
    model.n_tokens = n_tokens


def save(model: Any, path: Path) -> None:
    """Write the state of the only sequence."""
    tokens = (llama_cpp.llama_token * 1)()
    assert llama_cpp.llama_state_seq_save_file(model.ctx, str(path).encode(), 0, tokens, 0)


def load(model: Any, path: Path, ids: list[int]) -> None:
    """Load a state of these tokens."""
    tokens, count = (llama_cpp.llama_token * 1)(), ctypes.c_size_t()
    assert llama_cpp.llama_state_seq_load_file(model.ctx, str(path).encode(), 0, tokens, 1, ctypes.byref(count))
    model.n_tokens = len(ids)
    model.input_ids[: len(ids)] = ids


if __name__ == "__main__":
    main()
