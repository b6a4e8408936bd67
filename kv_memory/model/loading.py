"""Find, load and hash a model: all steps before its first token."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kv_memory.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from kv_memory.model.embedded import BUILT_IN, SUPPORTED, built_in, cache_folder, prepared_folder


def check_supported(model_type: str, *, where: str) -> None:
    """Raise `UnsupportedModelError` unless models of this type are supported; the message names those that are."""
    if model_type not in SUPPORTED:
        raise UnsupportedModelError(
            f"architecture {model_type!r} is not supported",
            where=where,
            next_step=f"Use a model of one of these: {', '.join(SUPPORTED.values())}.",
        )


def best_device() -> str:
    """`cuda` or `mps` if available, else `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str) -> str:
    """Return `device` if tensors can be made on it.

    Raises:
        ConfigError: Torch does not know it, was built without it, or the machine has none of this number.
    """
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device {device!r} cannot be used: {reason}",
            where="device",
            next_step=f"Use 'auto', which is {best_device()!r} on this machine.",
        ) from error
    return device


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 if the processor or GPU multiplies it in hardware, else float32."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.startswith("cpu"):
        # Rejected: oneDNN's own check, which accepts any AVX-512, where bfloat16 is emulated and slower than float32.
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return torch.bfloat16 if flags.get("avx512_bf16") or flags.get("amx_bf16") else torch.float32
    return torch.float32


def load_model(name: str, *, dtype: torch.dtype, device: str, revision: str | None) -> tuple[Any, Any, str]:
    """Load a causal LM, its tokenizer and the hash of its weights; the architecture is checked before any is read.

    Raises:
        ModelNotFoundError: The model does not exist, is not a model folder, or has unreadable or incomplete weights.
        UnsupportedModelError: The model's architecture is not one of `SUPPORTED`; the model has no usable tokenizer.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    model_built_in = built_in(name)
    where = str(prepared_folder(model_built_in)) if model_built_in else name
    local_only = not Path(where).is_dir() and not _reaches_hub(name, revision)
    not_found = ModelNotFoundError(
        "no such model here, and the hub cannot be reached" if local_only else "no such model",
        where=name,
        next_step=f"Use {', '.join(BUILT_IN)}, a local folder with config.json and safetensors weights, or a hub id "
        "(`owner/model`; needs a network or a filled hub cache).",
    )
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, local_files_only=local_only)
    except ValueError as error:  # unknown model type, or malformed id
        if "model type" not in str(error) and "architecture" not in str(error):
            raise not_found from error
        raise UnsupportedModelError(
            "Transformers does not know this architecture",
            where=name,
            next_step=f"Use a model of one of these: {', '.join(SUPPORTED.values())}.",
        ) from error
    except (OSError, TypeError) as error:  # TypeError: JSON, but not an object
        raise not_found from error
    check_supported(config.model_type, where=name)
    tokenizer = _load_tokenizer(where, name, revision, local_only)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=local_only,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelNotFoundError(
            f"the model's weights could not be read: {error}",
            where=name,
            next_step="Weights must be safetensors files; convert others with `model.save_pretrained(folder)`.",
        ) from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    model, info = loaded
    if info["missing_keys"]:  # Transformers only warns, and initialises them at random
        raise ModelNotFoundError(
            f"the model's weights are incomplete: {', '.join(sorted(info['missing_keys'])[:3])} missing",
            where=name,
            next_step="Download the model again.",
        )
    model = model.to(device)
    folder = Path(where) if Path(where).is_dir() else _hub_snapshot(name, revision)
    weights = hash_weight_files(folder) if folder else hash_parameters(model)
    return model, tokenizer, weights


def _reaches_hub(name: str, revision: str | None) -> bool:
    """Whether the hub answers. Without this single question, every file would be asked for six times, 24 seconds."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except (HfHubHTTPError, HFValidationError):  # it answers that it has no such model, or that the id is malformed
        return True
    except Exception:  # offline mode; a connection failed or timed out, of whichever HTTP library the hub's uses
        return False
    return True


def _load_tokenizer(where: str, name: str, revision: str | None, local_only: bool) -> Any:
    from transformers import AutoTokenizer

    error = UnsupportedModelError(
        "the model has no usable tokenizer",
        where=name,
        next_step="Put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights.",
    )
    folder = Path(where)
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "vocab.txt")
    if folder.is_dir() and not any((folder / file).is_file() for file in known):
        raise error  # Transformers would build an empty tokenizer from the model type alone
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, local_files_only=local_only)
    except Exception as cause:  # tokenizers raise many types: OSError, ValueError, TypeError, its own Exception
        raise error from cause
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise error
    return tokenizer


def _hub_snapshot(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def hash_parameters(model: Any) -> str:
    """SHA-256 over names, shapes and bytes of a model's parameters."""
    return _combine({name: _tensor_sha256(tensor) for name, tensor in model.state_dict().items()})


def hash_weight_files(folder: Path) -> str:
    """SHA-256 over names, shapes and bytes of the tensors in a folder's safetensors files, however they are sharded."""
    hashes: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        hashes.update(_tensor_hashes(path))
    return _combine(hashes)


def _combine(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _tensor_sha256(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(tensor.shape)}:{tensor.dtype}:".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensor_hashes(path: Path) -> dict[str, str]:
    """Hash of every tensor of one file, cached by path, size and modification time.

    Without the cache, every start would read gigabytes.
    """
    real = path.resolve()
    stat = real.stat()
    key = hashlib.sha256(f"{real}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()
    note = cache_folder() / "hashes" / f"{key}.json"
    with suppress(OSError, ValueError, KeyError):
        return dict(json.loads(note.read_text())["tensors"])
    with safe_open(str(real), framework="pt") as file:
        hashes = {name: _tensor_sha256(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
    with suppress(OSError):  # with a read-only home, the hashes are computed every time
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as scratch:
            json.dump({"path": str(real), "tensors": hashes}, scratch)
        os.replace(scratch.name, note)
    return hashes
