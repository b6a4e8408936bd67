"""kvpress's presses, made to compress a document behind a prefix that is never pruned, to an exact number of entries.

kvpress takes a share of a whole sequence away. Here the sequence is the shared prefix and the document, as in
kv-memory, and what remains must be the prefix and `n_kept` entries of the document. Scores are kvpress's own, over the
whole sequence, as it would compute them for this text; only the prefix's are raised above all others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import (
    BasePress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    ObservedAttentionPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
)

__all__ = ["METHODS", "Recipe"]

logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip tells on every use that it takes several passes


@dataclass(frozen=True)
class Recipe:
    """How one method is built.

    Attributes:
        make: From `(n_prefix, n_tokens, n_kept)`, the lengths of prefix and document and the entries to keep of the
            latter.
        eager: Whether the press needs the attention weights, which only Transformers' eager attention returns.
        settings: What differs from kvpress's defaults, for the record.
    """

    make: Callable[[int, int, int], BasePress]
    eager: bool = False
    settings: str = ""


def share(n_kept: int, n_all: int) -> float:
    """The `compression_ratio` at which `int(n_all * (1 - ratio))` is exactly `n_kept`, whatever floats do."""
    return 1 - (n_kept + 0.5) / n_all if n_kept < n_all else 0.0


@dataclass
class Behind(ScorerPress):
    """A press whose scores of the prefix are raised above all others; `ScorerPress.compress` then does the rest."""

    inner: ScorerPress | None = None
    n_prefix: int = 0

    def post_init_from_model(self, model: Any) -> None:
        """Passed on."""
        assert self.inner is not None
        self.inner.post_init_from_model(model)

    def score(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> torch.Tensor:
        """The inner press's scores of the whole sequence, `(1, num_kv_heads, n_prefix + n_tokens)`."""
        assert self.inner is not None
        self.inner.compression_ratio = self.compression_ratio
        scores = self.inner.score(module, hidden_states, keys, values, attentions, kwargs).clone()
        scores[..., : self.n_prefix] = torch.inf
        return scores


def scored(press: Callable[[int, int], ScorerPress], *, eager: bool = False, settings: str = "") -> Recipe:
    """A recipe for a press that scores; `press` is made from `(n_prefix, n_kept)`."""

    def make(n_prefix: int, n_tokens: int, n_kept: int) -> BasePress:
        ratio = share(n_prefix + n_kept, n_prefix + n_tokens)
        return Behind(ratio, inner=press(n_prefix, n_kept), n_prefix=n_prefix)

    return Recipe(make, eager=eager, settings=settings)


@dataclass
class KVzipBehind(KVzipPress):
    """KVzip behind a prefix.

    kvpress takes the head of the model's chat template for the part that is not compressed, and its tail for what
    follows the request to repeat. Here the prefix is ours, and what follows is a line break, which is what kvpress
    itself takes for a model without a chat template.

    Attributes:
        n_prefix: Tokens that are neither asked for nor pruned.
        n_kept: Entries of the document that remain, per head on average.
        per_head: Exactly `n_kept` in every head, and the others really gone. Otherwise kvpress's own choice: one
            ranking over all layers and heads (or over the heads of each layer, with `layerwise`) and as many entries
            in total; what is pruned stays in the cache and is only marked, see `asking`.
    """

    n_prefix: int = 0
    n_kept: int = 0
    per_head: bool = False

    def _perform_kvzip_compression(self, model: Any, tokenizer: Any) -> None:
        self.prefix_length = self.n_prefix
        self._suffix_ids = tokenizer.encode("\n", return_tensors="pt", add_special_tokens=False)
        super()._perform_kvzip_compression(model, tokenizer)

    def compress_post(self, model: Any) -> None:
        """Prune by the scores; called once all parts of the document have been asked for."""
        if not self.per_head:
            # The scores of the first `n_sink` are raised in there, and this is the only thing the field does by now.
            n_sink, self.n_sink = self.n_sink, self.n_prefix
            super().compress_post(model)
            self.n_sink = n_sink
            return
        self.score_val[..., : self.n_prefix] = torch.inf
        indices = self.score_val.topk(self.n_prefix + self.n_kept, dim=-1).indices
        for layer, here in zip(self._cache.layers, indices, strict=True):
            here = here.unsqueeze(-1).expand(-1, -1, -1, layer.keys.shape[-1])
            layer.keys, layer.values = layer.keys.gather(2, here), layer.values.gather(2, here)


def kvzip(*, layerwise: bool = False, per_head: bool = False, settings: str = "") -> Recipe:
    """A recipe for KVzip."""

    def make(n_prefix: int, n_tokens: int, n_kept: int) -> BasePress:
        # One ratio serves all forms: kvpress multiplies it by the entries of a layer or of the model and cuts the
        # fraction off. A tenth of one entry of one head makes sure it cuts nothing else off.
        ratio = (n_tokens - n_kept + 1e-4) / (n_prefix + n_tokens)
        return KVzipBehind(ratio, layerwise=layerwise, n_prefix=n_prefix, n_kept=n_kept, per_head=per_head)

    return Recipe(make, settings=settings)


METHODS: dict[str, Recipe] = {
    # The sinks are the prefix, which is kept anyway, so all `n_kept` entries are the most recent ones.
    "kvpress:streaming_llm": scored(lambda n_prefix, _: StreamingLLMPress(n_sink=n_prefix), settings="n_sink=n_prefix"),
    "kvpress:observed_attention": scored(lambda *_: ObservedAttentionPress(), eager=True),
    "kvpress:snapkv": scored(lambda *_: SnapKVPress()),
    # With the default window of 64, every budget below that is a draw among the last 64 tokens: kvpress gives them all
    # the same score. Here half the budget goes to the window and half to what it looks at.
    "kvpress:snapkv_short": scored(
        lambda _, n_kept: SnapKVPress(window_size=max(1, min(64, n_kept // 2))), settings="window_size=n_kept/2<=64"
    ),
    "kvpress:expected_attention": scored(lambda *_: ExpectedAttentionPress()),
    "kvpress:keydiff": scored(lambda *_: KeyDiffPress()),
    "kvpress:knorm": scored(lambda *_: KnormPress()),
    "kvpress:kvzip": kvzip(),
    "kvpress:kvzip_layerwise": kvzip(layerwise=True, settings="layerwise"),
    "kvpress:kvzip_per_head": kvzip(per_head=True, settings="n_kept in every head"),
}
