from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from kv_memory.compress import Adapter, AdapterConfig, Compressor
from kv_memory.compress.adapter import default_eta
from kv_memory.compress.prefill import PrefillRouting
from kv_memory.compress.routing import routed_with
from kv_memory.errors import AdapterError, ConfigError
from kv_memory.model.attention import ForwardContext
from kv_memory.model.backbone import Backbone
from tests.conftest import make_backbone, make_model
from tests.reference import FixedRouting, letters, plain_model

NAMES = ["llama", "qwen3", "gemma3", "phi3"]
FILES = ["adapter_config.json", "adapter_model.safetensors", "scorer.safetensors", "kv_distill.json"]
TEXT = letters(60)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    Adapter.create(make_backbone(), rank=4, zero_init=False, seed=3).save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """An adapter folder to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def logits(backbone: Any, routing: torch.Tensor | None = None) -> torch.Tensor:
    ids = torch.tensor([backbone.encode(letters(20))])
    with torch.no_grad():
        return backbone.logits(
            ids,
            backbone.prefixed_cache(20),
            every=True,
            context=ForwardContext(routing=None if routing is None else FixedRouting(routing)),
        )


# -- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["token", "head", "layer"])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_adapter_loads_unchanged(name: str, scorer: Any, tmp_path: Path) -> None:
    backbone = make_backbone(name)
    adapter = Adapter.create(backbone, rank=4, alpha=6, eta=2, scorer=scorer, zero_init=False)
    made = Compressor(backbone, adapter=adapter).compress(TEXT, keep_ratio=0.3)
    adapter.save(tmp_path)
    assert set(FILES) <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob("*.bin"))

    fresh = make_backbone(name)
    loaded = Adapter.load(tmp_path, fresh)
    assert loaded.config == adapter.config
    assert loaded.sha256 == adapter.sha256
    assert Compressor(fresh, adapter=loaded).compress(TEXT, keep_ratio=0.3).to_bytes() == made.to_bytes()
    loaded.save(tmp_path / "again")
    for file in FILES[1:]:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated"
)  # PEFT asks for it; Transformers renamed it in 5.24
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_folder_is_an_ordinary_peft_adapter(name: str, tmp_path: Path) -> None:
    backbone = make_backbone(name)
    adapter = Adapter.create(backbone, rank=4, zero_init=False)
    adapter.save(tmp_path)
    everywhere = logits(backbone, torch.ones(1, 20, dtype=torch.bool))
    # Plain PEFT knows no routing: it adapts every token, prefix included, as an adapter of any kind does.
    plain: Any = PeftModel.from_pretrained(make_model(name), str(tmp_path)).eval()
    ids = torch.tensor([backbone.encode(letters(20))])
    alone = backbone.empty_cache(20)
    with torch.no_grad():
        routed = backbone.logits(
            ids, alone, every=True, context=ForwardContext(routing=FixedRouting(torch.ones(1, 20) > 0))
        )
        torch.testing.assert_close(routed, plain(ids).logits, rtol=1e-4, atol=1e-3)
        assert (routed - plain_model(name)(ids).logits).abs().max() > 0.1
    assert everywhere.shape == routed.shape


def test_equal_adapters_have_equal_hashes(saved: Path) -> None:
    same = Adapter.create(make_backbone(), rank=4, zero_init=False, seed=3)
    assert same.sha256 == Adapter.load(saved, make_backbone()).sha256
    before = same.sha256
    with torch.no_grad():
        same.scorer.heads[0][3].bias.add_(1e-3)
    assert same.sha256 != before
    assert Adapter.create(make_backbone(), rank=4, zero_init=False, seed=4).sha256 != before


def test_an_untrained_adapter_changes_nothing_where_it_is_routed() -> None:
    backbone = make_backbone()
    before = logits(backbone)
    Adapter.create(backbone, rank=4)
    torch.testing.assert_close(logits(backbone, torch.ones(1, 20) > 0), before, rtol=1e-5, atol=1e-5)


def test_making_an_adapter_leaves_the_random_state_alone() -> None:
    backbone = make_backbone()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Adapter.create(backbone, rank=4)
    assert torch.equal(torch.rand(3), expected)


# -- folders that cannot be used ---------------------------------------------------------------------------------------


def assert_refused(folder: Path, backbone: Any, kind: type[AdapterError] = AdapterError) -> AdapterError:
    """Refused, and the backbone is as it was: same logits, and ready for a sound adapter."""
    before = logits(backbone)
    with pytest.raises(kind) as caught:
        Adapter.load(folder, backbone)
    assert type(caught.value) is kind
    assert str(folder) in (caught.value.where or "")
    assert caught.value.next_step
    assert torch.equal(logits(backbone), before)
    assert not hasattr(backbone.model, "peft_config")
    assert [name for name, _ in backbone.model.named_parameters() if "lora" in name] == []
    return caught.value


@pytest.mark.parametrize("file", FILES)
def test_a_folder_with_a_missing_file_is_rejected(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert file in assert_refused(folder, make_backbone()).what


def test_a_missing_folder_is_rejected(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nothing", make_backbone())


def test_pickled_weights_are_never_loaded(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in assert_refused(folder, make_backbone()).what


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe"])
@pytest.mark.parametrize("file", FILES)
def test_a_garbled_file_is_rejected(folder: Path, saved: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    backbone = make_backbone()
    assert_refused(folder, backbone)
    assert Adapter.load(saved, backbone).config.architecture == "llama"


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"unknown": 1},
        {"eta": 9},
        {"eta": 0},
        {"scorer_size": 7},
        {"scorer": "head"},
        {"scorer": "all"},
        {"routed": 1},
        {"full_strength_ratio": 0},
    ],
)
def test_invalid_recorded_settings_are_rejected(folder: Path, change: dict[str, Any]) -> None:
    data = json.loads((folder / "kv_distill.json").read_text())
    (folder / "kv_distill.json").write_text(json.dumps({**data, **change}))
    assert_refused(folder, make_backbone())


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "scorer.safetensors"])
@pytest.mark.parametrize("spoil", ["shape", "missing"])
def test_weights_of_wrong_shape_or_missing_are_rejected(folder: Path, file: str, spoil: str) -> None:
    tensors = load_file(folder / file)
    name = sorted(tensors)[3]
    if spoil == "shape":
        tensors[name] = torch.zeros(3, 5)
    else:
        del tensors[name]
    save_file(tensors, folder / file)
    backbone = make_backbone()
    assert_refused(folder, backbone)
    assert Adapter.create(backbone, rank=2).config.eta == 1


def test_an_adapter_of_another_model_is_rejected(folder: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    backbone = Backbone(model, make_backbone().tokenizer, prompt=make_backbone().prompt, name="finetuned")
    error = assert_refused(folder, backbone, AdapterError)
    assert "tiny-llama" in error.what and "finetuned" in error.what
    assert error.next_step is not None and "train an adapter" in error.next_step


def test_a_second_adapter_is_rejected_until_the_first_is_detached(saved: Path) -> None:
    backbone = make_backbone()
    before = logits(backbone)
    first = Adapter.load(saved, backbone)
    for attach in (lambda: Adapter.load(saved, backbone), lambda: Adapter.create(backbone)):
        with pytest.raises(AdapterError, match="already has an adapter") as caught:
            attach()
        assert caught.value.next_step is not None and "detach" in caught.value.next_step
    first.detach()
    assert torch.equal(logits(backbone), before)
    second = Adapter.load(saved, backbone)
    routing = torch.ones(1, 20, dtype=torch.bool)
    assert not torch.equal(logits(backbone, routing), before)
    second.detach()
    assert torch.equal(logits(backbone, routing), before)


@pytest.mark.parametrize(("num_layers", "eta"), [(1, 1), (4, 1), (12, 3), (23, 5), (24, 6), (32, 6)])
def test_default_eta(num_layers: int, eta: int) -> None:
    assert default_eta(num_layers) == eta


def test_eta_outside_the_model_is_rejected() -> None:
    with pytest.raises(ConfigError, match="eta must be in the range 1 to 4"):
        Adapter.create(make_backbone(), eta=5)
    # and nothing was attached
    assert isinstance(Adapter.create(make_backbone(), eta=4).config, AdapterConfig)


# -- routing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["phi3", "phi3_longrope", "llama"])
def test_only_the_queries_of_a_fused_projection_are_adapted(name: str) -> None:
    backbone = make_backbone(name)
    adapter = Adapter.create(backbone, rank=4, zero_init=False)
    ids, routing = torch.tensor([backbone.encode(letters(20))]), torch.ones(1, 20, dtype=torch.bool)
    caches = [backbone.prefixed_cache(20) for _ in range(2)]
    queries: list[list[torch.Tensor]] = [[], []]

    class Watch:
        def __init__(self, into: list[torch.Tensor]) -> None:
            self.into = into

        def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, kind: Any) -> None:
            self.into.append(query)

    with torch.no_grad():
        for cache, into, mask in zip(caches, queries, (None, routing), strict=True):
            backbone.prefill(
                ids,
                cache,
                context=ForwardContext(routing=None if mask is None else FixedRouting(mask), observer=Watch(into)),
            )
    assert (queries[0][0] - queries[1][0]).abs().max() > 0.01
    for before, after in zip(caches[0].layer(0), caches[1].layer(0), strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(caches[0].layer(1)[0], caches[1].layer(1)[0])  # of the next layer, through W_O
    adapter.detach()


def test_layers_may_route_different_tokens() -> None:
    """A mask per layer: with one that is set in the last layer alone, all layers before it are as without."""
    backbone = make_backbone()
    Adapter.create(backbone, rank=4, zero_init=False)
    ids = torch.tensor([backbone.encode(letters(20))])
    routing = torch.zeros(4, 1, 20, dtype=torch.bool)
    routing[2, 0, 5] = True
    plain, routed = backbone.prefixed_cache(20), backbone.prefixed_cache(20)
    with torch.no_grad():
        backbone.prefill(ids, plain)
        backbone.prefill(ids, routed, context=ForwardContext(routing=FixedRouting(routing)))
    differs = [not torch.equal(plain.layer(i)[1], routed.layer(i)[1]) for i in range(4)]
    assert differs == [False, False, False, True]  # the output of layer 2 is what layer 3 makes keys of
    assert torch.equal(plain.layer(3)[1][:, :, :16], routed.layer(3)[1][:, :, :16])  # prefix of 11 and 5 tokens


def test_strength_scales_the_lora_delta() -> None:
    """Token by token or for whole rows; at 1 the LoRA of a mask, at 0 the frozen model."""
    backbone = make_backbone()
    adapter = Adapter.create(backbone, rank=4, zero_init=False)
    projection = backbone.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 48)
    with routed_with(None):
        frozen = projection(x)
    with routed_with(torch.ones(2, 3, dtype=torch.bool)):
        delta = projection(x) - frozen
    assert delta.abs().max() > 1e-3
    for strength in (torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.0, 0.0]]), torch.tensor([[0.5], [0.0]])):
        with routed_with(strength), torch.no_grad():
            found = projection(x) - frozen
        torch.testing.assert_close(found, delta * strength.expand(2, 3)[..., None], rtol=1e-3, atol=1e-5)
    adapter.detach()


@pytest.mark.parametrize("routed", ["kept", "document"])
def test_lora_strength_falls_with_the_keep_ratio(routed: Any) -> None:
    adapter = Adapter.create(make_backbone(), rank=2, scorer="head", routed=routed, full_strength_ratio=1 / 16)
    lengths, hidden = torch.tensor([64, 64, 64, 64]), torch.randn(4, 64, 48)
    watching = PrefillRouting(adapter=adapter, lengths=lengths, n_kept=torch.tensor([1, 4, 16, 64]))
    watching.look(adapter.config.eta, hidden)
    mask = watching.enter(adapter.config.eta, hidden)
    assert mask is not None
    torch.testing.assert_close(mask.amax(1), torch.tensor([1.0, 1.0, 0.5, 0.0]))
    plain = Adapter.create(make_backbone(), rank=2)
    torch.testing.assert_close(plain.config.strength(torch.tensor([0.01, 1.0])), torch.tensor([1.0, 1.0]))


def test_tokens_kept_by_any_head_are_routed() -> None:
    adapter = Adapter.create(make_backbone(), rank=2, scorer="layer")
    lengths, hidden = torch.tensor([5, 4]), torch.randn(2, 5, 48)
    watching = PrefillRouting(adapter=adapter, lengths=lengths, n_kept=torch.tensor([2, 1]))
    mask = watching.enter(1, hidden)
    assert mask is not None and mask.shape == (2, 5)
    scores = adapter.scorer(hidden, 1)[0]
    scores[1, :, 4] = -torch.inf  # padding
    for row, n_kept in enumerate([2, 1]):
        best = {int(i) for head in scores[row] for i in head.argsort(descending=True)[:n_kept]}
        assert {i for i in range(5) if mask[row, i]} == best


def test_another_thread_does_not_see_the_mask() -> None:
    backbone = make_backbone()
    Adapter.create(backbone, rank=4, zero_init=False)
    projection: Any = backbone.layers[0].self_attn.q_proj  # type: ignore[union-attr]
    x = torch.randn(1, 20, 48, generator=torch.Generator().manual_seed(0))
    found: dict[str, torch.Tensor] = {}

    def inside(*_: Any) -> None:
        thread = threading.Thread(target=lambda: found.update(other=projection(x)))
        thread.start()
        thread.join()
        found["same"] = projection(x)

    with torch.no_grad():
        base = projection.get_base_layer()(x)
        handle = backbone.layers[0].input_layernorm.register_forward_hook(inside)  # type: ignore[union-attr]
        logits(backbone, torch.ones(1, 20, dtype=torch.bool))
        handle.remove()
        assert torch.equal(found["other"], base)
        assert not torch.equal(found["same"], base)
        assert torch.equal(projection(x), base)  # and after the pass nothing is left of it


def test_an_error_in_a_layer_resets_the_routing_mask() -> None:
    backbone = make_backbone()
    Adapter.create(backbone, rank=4, zero_init=False)
    before = logits(backbone)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = backbone.layers[1].mlp.register_forward_hook(fail)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="out of memory"):
        logits(backbone, torch.ones(1, 20, dtype=torch.bool))
    handle.remove()
    projection: Any = backbone.layers[1].self_attn.q_proj  # type: ignore[union-attr]
    x = torch.randn(1, 3, 48)
    with torch.no_grad():
        assert torch.equal(projection(x), projection.get_base_layer()(x))
    assert torch.equal(logits(backbone), before)
