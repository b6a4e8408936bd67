from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kv_memory import Compressor, DecodeSettings, Generator, KVMemory
from kv_memory.compress import Adapter, RefineSettings
from kv_memory.errors import ConfigError
from kv_memory.model import int8_weights
from kv_memory.model.backbone import Backbone
from kv_memory.model.int8_weights import Int8Linear, add_int8_weights, plain_weights
from kv_memory.model.prompts import PromptForm
from kv_memory.train import TrainSettings, new_adapter
from kv_memory.train.trainer import Trainer
from tests.conftest import ARCHITECTURES, SHORT_FORM, make_backbone, make_model, make_tokenizer
from tests.memories import FERRY, FERRY_QUESTION

TEXT = "The ferry to Skarholm leaves at 7.40 from pier 4, and in winter at 9.15 from pier 2."


def int8_backbone(name: str = "llama", dtype: torch.dtype = torch.float32) -> Backbone:
    """The backbone of `make_backbone`, with int8 weights."""
    model = make_model(name).to(dtype)
    return Backbone(model, make_tokenizer(), prompt=PromptForm(**SHORT_FORM), weights="int8")


def next_logits(backbone: Backbone, n_rows: int = 1) -> torch.Tensor:
    """Logits after a document, which is prefilled, and a question."""
    cache = backbone.prefixed_cache(30, room=20, batch_size=n_rows)
    document, question = torch.arange(70, 100), torch.arange(100, 112)
    with torch.no_grad():
        backbone.prefill(document.expand(n_rows, -1), cache)
        return backbone.logits(question.expand(n_rows, -1), cache)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_logits_are_close_and_not_the_same(name: str) -> None:
    plain, quick = next_logits(make_backbone(name)), next_logits(int8_backbone(name))
    assert 0 < float((plain - quick).norm() / plain.norm()) < 0.25  # random weights amplify what rounding changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_rows", [1, 2, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_as_exact_as_eight_bits_are(n_rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(n_rows, 96) * torch.logspace(-3, 3, n_rows)[:, None]  # a scale of its own for each row
    # What the definition says: codes of each weight row and each input row, multiplied exactly.
    weight, rows = linear.weight.double(), x.to(dtype).double()
    w_scale, x_scale = weight.abs().amax(1) / 127, rows.abs().amax(1, keepdim=True) / 127
    expected = (rows / x_scale).round() @ (weight / w_scale[:, None]).round().T * x_scale * w_scale
    expected = expected + linear.bias.double() if bias else expected
    with torch.no_grad(), int8_weights.int8_weights():
        out = Int8Linear(linear, int8_weights._Rows())(x.to(dtype)[None])
    assert out.dtype == dtype and out.shape == (1, n_rows, 40)
    scale = expected.abs().amax(1, keepdim=True)
    assert float(((out[0].double() - expected) / scale).abs().max()) < 0.02


def test_a_row_of_zeros_gives_the_bias() -> None:
    linear = nn.Linear(32, 8).requires_grad_(False)
    with torch.no_grad(), int8_weights.int8_weights():
        out = Int8Linear(linear, int8_weights._Rows())(torch.zeros(2, 32))
    torch.testing.assert_close(out, linear.bias.expand(2, -1))


def test_layers_that_share_rows_do_not_mix_their_inputs() -> None:
    rows = int8_weights._Rows()
    one, two = (Int8Linear(nn.Linear(32, 8).requires_grad_(False), rows) for _ in range(2))
    a, b = torch.randn(3, 32), torch.randn(3, 32)
    with torch.no_grad(), int8_weights.int8_weights():
        first = one(a)
        two(a)
        two(b)
        torch.testing.assert_close(one(a.clone()), first, rtol=0, atol=0)
        assert not torch.equal(one(b), first)


# -- caches do not depend on the weights of answers --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"refine": RefineSettings(steps=2)}], ids=["matched", "refined"])
def test_caches_are_those_of_the_plain_model(options: dict[str, Any]) -> None:
    made = [
        Compressor(backbone, **options).compress(TEXT, keep_ratio=0.5)
        for backbone in (make_backbone(), int8_backbone())
    ]
    assert made[0].fingerprint == made[1].fingerprint
    assert torch.equal(made[0].keys, made[1].keys) and torch.equal(made[0].values, made[1].values)


def test_a_cache_of_the_plain_model_is_answered_with_int8_weights() -> None:
    cache = Compressor(make_backbone()).compress(TEXT, keep_ratio=0.5)
    answer = Generator(int8_backbone()).generate("When?", [cache], settings=DecodeSettings(max_new_tokens=4))
    assert len(answer.token_ids) == 4 and answer.n_cached_tokens > 11


def test_an_adapter_compresses_with_plain_weights(tmp_path: Path) -> None:
    new_adapter(make_backbone(), TrainSettings()).save(tmp_path)
    made = [
        Compressor(backbone, adapter=Adapter.load(tmp_path, backbone)).compress(TEXT, keep_ratio=0.5)
        for backbone in (make_backbone(), int8_backbone())
    ]
    assert made[0].fingerprint == made[1].fingerprint
    assert torch.equal(made[0].keys, made[1].keys)


def test_another_thread_compresses_with_plain_weights_meanwhile() -> None:
    backbone = int8_backbone()
    expected = Compressor(make_backbone()).compress(TEXT, keep_ratio=0.5).keys
    with int8_weights.int8_weights():  # of this thread
        found: list[torch.Tensor] = []
        worker = threading.Thread(target=lambda: found.append(Compressor(backbone).compress(TEXT, keep_ratio=0.5).keys))
        worker.start()
        worker.join()
    assert torch.equal(found[0], expected)


def test_plain_weights_are_exact() -> None:
    backbone = int8_backbone()
    with plain_weights():
        assert torch.equal(next_logits(backbone), next_logits(make_backbone()))
    assert not torch.equal(next_logits(backbone), next_logits(make_backbone()))


# -- the option --------------------------------------------------------------------------------------------------------


def test_it_is_not_recorded(model_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "prompt": PromptForm(**SHORT_FORM)}
    options |= {"model": str(model_folder), "selector": "attention"}
    with KVMemory.open(tmp_path / "store", weights="int8", **options) as memory:
        memory.add([("ferry", FERRY)])
        assert memory.backbone.weights == "int8"
        assert memory.ask(FERRY_QUESTION).sources
    with KVMemory.open(tmp_path / "store", **options) as memory:
        assert memory.backbone.weights == "plain"
        answer = memory.ask(FERRY_QUESTION)
        assert answer.sources and not answer.fallbacks
        assert memory.add([("ferry", FERRY)]).n_passages == 0  # nothing to compress again


def test_unknown_weights_are_rejected_before_anything_is_made(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights"):
        Backbone.load(model_folder, weights="int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weights"):
        KVMemory.open(tmp_path / "store", model=str(model_folder), weights="int3")  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()


def test_another_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="need a CPU") as caught:
        add_int8_weights(make_model("llama").to("meta"))
    assert "weights='plain'" in (caught.value.next_step or "")


@pytest.mark.parametrize("fault", ["wrong", "missing"])
def test_a_processor_without_exact_products_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    product = Int8Linear._product

    def faulty(self: Int8Linear, *args: Any) -> torch.Tensor:
        if fault == "missing":
            raise NotImplementedError("no kernel")
        return product(self, *args) * 0.5  # as if half of the sum had overflowed

    monkeypatch.setattr(Int8Linear, "_product", faulty)
    with pytest.raises(ConfigError, match="int8 weights cannot be used"):
        add_int8_weights(make_model("llama"))


def test_training_is_refused(tmp_path: Path) -> None:
    backbone = int8_backbone()
    with pytest.raises(ConfigError, match="cannot be trained on int8"):
        Trainer(new_adapter(backbone, TrainSettings()), [], settings=TrainSettings(), out=tmp_path)
