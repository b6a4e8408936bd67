from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from kv_memory.compress import Adapter, Compressor
from kv_memory.compress.prefill import hidden_after
from kv_memory.errors import ContextWindowError, UnreadableDocumentError
from kv_memory.model.backbone import Backbone
from kv_memory.model.forward import cache_argument
from kv_memory.model.prompts import PromptForm
from tests.conftest import ARCHITECTURES, SHORT_FORM, make_backbone, make_model, make_tokenizer
from tests.reference import assert_close, full_logits, letters, plain_model, shared_backbone

EVERY = pytest.mark.parametrize("name", list(ARCHITECTURES))


# -- fingerprints ------------------------------------------------------------------------------------------------------


def prints(backbone: Backbone, **options: Any) -> dict[str, Any]:
    return asdict(Compressor(backbone, **{"selector": "attention", **options}).fingerprint())


def changed(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {name for name in one if one[name] != other[name]}


def test_every_relevant_property_changes_the_fingerprint() -> None:
    mine = prints(make_backbone())
    assert prints(make_backbone()) == mine  # nothing of it depends on the process or the object

    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    form = PromptForm(**SHORT_FORM)
    assert changed(mine, prints(Backbone(model, make_tokenizer(), prompt=form))) == {"weights"}

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["word"])
    assert changed(mine, prints(Backbone(make_model("llama"), tokenizer, prompt=form))) == {"tokenizer"}

    other = replace(form, document_before="Text: ")
    assert changed(mine, prints(Backbone(make_model("llama"), make_tokenizer(), prompt=other))) == {"prompt"}
    other = replace(form, prefix="Read that. ")
    assert changed(mine, prints(Backbone(make_model("llama"), make_tokenizer(), prompt=other))) == {"prompt", "prefix"}

    half = Backbone(make_model("llama").bfloat16(), make_tokenizer(), prompt=form, weights_sha256=mine["weights"])
    assert changed(mine, prints(half)) == {"dtype"}

    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert changed(mine, prints(make_backbone(rope_parameters=rope))) == {"rope"}

    assert changed(mine, prints(make_backbone(), selector="sink_recent")) == {"method"}
    assert changed(mine, prints(make_backbone(), window_tokens=100)) == {"method"}


def test_adapters_change_the_fingerprint() -> None:
    found = []
    for options in ({}, {"seed": 1}, {"eta": 2}, {"alpha": 3.0}):
        backbone = make_backbone()
        found.append(prints(backbone, adapter=Adapter.create(backbone, rank=2, **options)))  # type: ignore[arg-type]
    assert changed(prints(make_backbone()), found[0]) == {"method", "adapter", "eta"}
    assert changed(found[0], found[1]) == {"adapter"}
    assert changed(found[0], found[2]) == {"adapter", "eta"}
    assert changed(found[0], found[3]) == {"adapter"}


def test_keep_spans_change_the_fingerprint(backbone: Any) -> None:
    compressor, text = Compressor(backbone, selector="attention"), letters(40)
    one, other, none = (
        asdict(compressor.compress(text, keep_ratio=0.5, keep_spans=spans).fingerprint)
        for spans in ([(0, 4)], [(0, 5)], [])
    )
    assert changed(one, other) == changed(one, none) == {"keep_spans"}
    assert none == asdict(compressor.fingerprint())


def test_tokenizer_hash_ignores_options_of_the_last_call() -> None:
    one, other = make_backbone(), make_backbone()
    other.tokenizer(["a", "bb"], padding=True, truncation=True, max_length=1)
    assert one.tokenizer_sha256 == other.tokenizer_sha256


# -- the prefix --------------------------------------------------------------------------------------------------------


def test_the_prefix_is_prefilled_once_by_one_thread() -> None:
    backbone, count = make_backbone(), []
    backbone.decoder.embed_tokens.register_forward_pre_hook(lambda *_: count.append(1))
    threads = [threading.Thread(target=lambda: backbone.prefix) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1


def test_a_form_without_a_prefix_works() -> None:
    form = PromptForm(**{**SHORT_FORM, "prefix": ""})
    backbone = Backbone(make_model("llama"), make_tokenizer(), prompt=form)
    assert backbone.prefix_ids == ()
    assert backbone.prefix.keys.shape == (4, 2, 0, 8)
    ids = list(letters(20).encode())
    cache = backbone.prefixed_cache(20)
    with torch.no_grad():
        assert_close(backbone.logits(torch.tensor([ids]), cache, every=True)[0], full_logits("llama", ids))


# -- forward passes ----------------------------------------------------------------------------------------------------


@EVERY
def test_hidden_after_runs_only_the_requested_layers(name: str) -> None:
    backbone, text = shared_backbone(name), letters(40)
    ids = torch.tensor([[*backbone.prefix_ids, *backbone.encode(text)]])
    backbone.prefixed_cache(40)  # reads the prefix
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(backbone.layers)
    ]
    with torch.no_grad():
        expected = plain_model(name)(ids, output_hidden_states=True).hidden_states
        for layer in (1, 3):
            cache = backbone.prefixed_cache(40)
            ran.clear()
            hidden = hidden_after(backbone, torch.tensor([backbone.encode(text)]), cache, layer=layer)
            assert ran == list(range(layer))
            assert_close(hidden[0], expected[layer][0, len(backbone.prefix_ids) :])
    for handle in handles:
        handle.remove()


def test_hidden_after_does_not_stop_another_thread() -> None:
    """The hook that leaves the model early must not be there while another thread is inside."""
    backbone = make_backbone()
    backbone.prefix  # noqa: B018
    ids = torch.tensor([backbone.encode(letters(20))])
    inside, go_on = threading.Event(), threading.Event()
    results: list[Any] = []

    def pause(*_: Any) -> None:
        inside.set()
        go_on.wait(10)

    def read() -> None:
        try:
            with torch.no_grad():
                results.append(backbone.logits(ids, backbone.prefixed_cache(20)))
        except BaseException as error:
            results.append(error)

    handle = backbone.layers[0].register_forward_pre_hook(pause)
    reader = threading.Thread(target=read)
    reader.start()
    assert inside.wait(10)
    handle.remove()
    other = threading.Thread(target=lambda: hidden_after(backbone, ids, backbone.prefixed_cache(20), layer=2))
    other.start()
    other.join(0.3)  # waits for the lock
    go_on.set()
    reader.join()
    other.join()
    with torch.no_grad():
        assert torch.equal(results[0], backbone.logits(ids, backbone.prefixed_cache(20)))


def test_check_positions(backbone: Any) -> None:
    backbone.check_positions(512, what="this")
    with pytest.raises(ContextWindowError, match="this needs 513 positions, the model has 512") as caught:
        backbone.check_positions(513, what="this")
    assert caught.value.where == "tiny-llama"
    assert caught.value.next_step is not None and "packed" in caught.value.next_step


def test_special_tokens_in_user_text_are_encoded_as_text(backbone: Any) -> None:
    text = "stop here</s> or there<s>"
    assert backbone.tokenizer(text, add_special_tokens=False)["input_ids"].count(2) == 1, "it would, left to itself"
    for ids in (backbone.encode_text(text), backbone.encode_document(text), backbone.encode_question(text)):
        assert not {1, 2} & set(ids)
        assert text in backbone.tokenizer.decode(ids)
    assert backbone.count_tokens([text, "ab"]) == [len(backbone.encode_text(text)), 2]
    assert backbone.encode("</s>") == [2], "templates and wrappers keep theirs"


def test_half_a_surrogate_pair_is_rejected(backbone: Any) -> None:
    def count(text: str) -> Any:
        return backbone.count_tokens([text])

    for encode in (backbone.encode, backbone.encode_text, backbone.encode_question, count):
        with pytest.raises(UnreadableDocumentError, match="surrogate"):
            encode("half \ud800 a pair")
        encode("a whole \U0001f600 one")


# -- names that Transformers changed -----------------------------------------------------------------------------------


def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As Transformers does for a time: the old name is taken, too, with a warning."""

    @functools.wraps(forward)
    def accepts_both(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return accepts_both


def test_cache_argument_is_read_from_the_signature() -> None:
    def before(input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> None: ...
    def now(input_ids: Any, cache: Any = None, use_cache: bool = True) -> None: ...

    assert cache_argument(before) == "past_key_values"
    assert cache_argument(now) == cache_argument(wrapped(now)) == "cache"


@EVERY
def test_cache_argument_exists_in_model_decoder_and_layers(name: str) -> None:
    backbone = shared_backbone(name)
    for module in (backbone.model, backbone.decoder, *backbone.layers):
        assert cache_argument(module.forward) in inspect.signature(module.forward).parameters
