"""The built-in models: the claims that a random model cannot show. Seconds each, hence slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kv_memory import DecodeSettings, KVMemory
from kv_memory.cache.distilled import DistilledCache
from kv_memory.compress import Adapter, Compressor
from kv_memory.generate import compose
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import BUILT_IN
from kv_memory.model.prompts import PASSAGE

TEXT = (
    "The ferry to Skarholm leaves from pier 4 at 7.40 every morning except Sunday. Tickets are sold on board and cost "
    "12 crowns; children under six travel free. In winter the crossing takes fifty minutes, because the captain, "
    "Ingrid Moe, goes round the northern reef to keep clear of the ice. Bicycles are carried, dogs are kept on a lead."
)
QUESTION = "Who is the captain of the ferry?"


needs_weights = pytest.mark.skipif(not BUILT_IN["smollm2"].is_prepared, reason="smollm2 is not prepared (`make setup`)")


@pytest.fixture(scope="module")
def embedded() -> Any:
    return Backbone.load("smollm2", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def reference() -> Any:
    """The same weights, untouched."""
    return AutoModelForCausalLM.from_pretrained(
        BUILT_IN["smollm2"].folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def question_logits(backbone: Any, *caches: DistilledCache) -> torch.Tensor:
    ids = torch.tensor([backbone.encode_question(QUESTION)])
    return backbone.logits(ids, compose(backbone, caches, n_question=ids.shape[1]), every=True)[0]  # type: ignore[no-any-return]


@needs_weights
@pytest.mark.slow
class TestEmbedded:
    def test_smollm2_has_the_documented_properties(self, embedded: Any) -> None:
        assert (embedded.num_layers, embedded.num_heads, embedded.num_kv_heads, embedded.head_dim) == (30, 9, 3, 64)
        assert (embedded.context_window, embedded.prompt) == (8192, PASSAGE)
        assert Backbone.load("smollm2", dtype="bfloat16", device="cpu").kv_bytes_per_token == 23_040

    @torch.no_grad()
    def test_an_uncompressed_cache_equals_a_full_prefill(self, embedded: Any, reference: Any) -> None:
        cache = Compressor(embedded).compress(TEXT, keep_ratio=1.0)
        question = embedded.encode_question(QUESTION)
        ids = torch.tensor([[*embedded.prefix_ids, *embedded.encode_document(TEXT), *question]])
        expected = reference(ids).logits[0, -len(question) :]
        torch.testing.assert_close(question_logits(embedded, cache), expected, rtol=1e-3, atol=1e-3)

    def test_an_adapter_does_not_change_the_model(self, embedded: Any) -> None:
        before = question_logits(embedded)
        adapter = Adapter.create(embedded, rank=4, zero_init=False)
        assert adapter.config.eta == 6
        try:
            assert torch.equal(question_logits(embedded), before)
        finally:
            adapter.detach()

    def test_distilled_caches_are_closer_to_the_text_than_no_document(self, embedded: Any) -> None:
        compressor = Compressor(embedded)
        teacher = question_logits(embedded, compressor.compress(TEXT, keep_ratio=1.0)).log_softmax(-1)

        def kl(*caches: DistilledCache) -> float:
            """Of the distribution after the question, in nats; lower is better."""
            student = question_logits(embedded, *caches).log_softmax(-1)
            return float((teacher[-1].exp() * (teacher[-1] - student[-1])).sum())

        nothing = kl()
        document = compressor.prefill(TEXT)
        half, eighth = (kl(document.keep(ratio)) for ratio in (0.5, 0.125))
        assert half < eighth < nothing
        assert half < nothing / 3

    def test_smollm2_answers_from_a_store(self, tmp_path: Path, embedded: Any) -> None:
        settings = DecodeSettings(max_new_tokens=8)
        with KVMemory.open(tmp_path / "store", model=embedded, keep_ratio=0.5, keep_text=True) as memory:
            assert memory.settings.top_k == 1 and memory.settings.passage_tokens == 256
            report = memory.add([("ferry", TEXT), ("oil", "The lamp burned whale oil until 1921.")])
            assert report.cache_bytes < 0.53 * report.full_kv_bytes
            answer = memory.ask(QUESTION, settings=settings)
            assert [hit.document_id for hit in answer.sources] == ["ferry"]
            assert "Moe" in answer.text
            assert "Moe" in memory.ask(QUESTION, settings=settings, read_from="text").text
