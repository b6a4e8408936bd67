"""Training-free selectors: which tokens of a document to keep, without an adapter.

A selector prefills the document, which it may observe, and may run requests behind it. It scores every token, for all
heads together or for each layer and KV head. It never sees a user's question.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.matching import Matched
from kv_memory.compress.reference_rows import repeat_rows
from kv_memory.config import Budget, SelectorName, check_choice
from kv_memory.errors import ConfigError
from kv_memory.model.attention import AttentionKind, ForwardContext, attention_probabilities
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache

OBSERVED_QUERIES = 256  # processed at once: their attention is held in memory in float32


class Selector(Protocol):
    """Scores the tokens of a document."""

    name: str  # with settings; part of the fingerprint
    extra_tokens: int  # most tokens that the selector runs behind the document
    budget: Budget  # distribution of entries among the heads

    def score(self, backbone: Backbone, ids: torch.Tensor, cache: PositionedCache) -> torch.Tensor:
        """Prefill a document and score its tokens; higher is kept.

        Args:
            backbone: Model that prefills the document.
            ids: `(1, n_tokens)`, token ids of the document.
            cache: Cache with the prefix, and room for the document and `extra_tokens`; afterwards it holds the document
                as prefilled.

        Returns:
            Scores `(n_tokens,)`, or `(num_layers, num_kv_heads, n_tokens)`; float32.
        """


class ReceivedAttention:
    """Observer: attention that each of a document's `n_tokens` receives, per layer and KV head.

    `reduce` is `mean` over the queries that could see a token, or `max` over queries and over the query heads that
    share a KV head.
    """

    def __init__(self, backbone: Backbone, *, n_tokens: int, reduce: Literal["mean", "max"]) -> None:
        n_prefix = len(backbone.prefix_ids)
        self._columns = slice(n_prefix, n_prefix + n_tokens)
        self._mean = reduce == "mean"
        self.scores = torch.zeros(backbone.num_layers, backbone.num_kv_heads, n_tokens, device=backbone.device)
        self.n_queries = torch.zeros(backbone.num_layers, n_tokens, device=backbone.device)  # that see a token

    def observe(self, layer: int, query: torch.Tensor, key: torch.Tensor, kind: AttentionKind) -> None:
        """Add one layer's attention; see `AttentionObserver`.

        Prefix, document and request stand side by side here, so that indices serve as positions.
        """
        new, length = query.shape[2], key.shape[2]
        kv_heads = key.shape[1]
        for start in range(0, new, OBSERVED_QUERIES):
            stop = min(start + OBSERVED_QUERIES, new)
            end = length - new + stop
            mask = torch.ones(stop - start, end, dtype=torch.bool, device=query.device).tril(end - (stop - start))
            if kind.window is not None:
                mask = mask.triu(end - (stop - start) - kind.window + 1)
            weights = attention_probabilities(query[:, :, start:stop], key[:, :, :end], mask, kind)
            here = weights[0, :, :, self._columns].unflatten(0, (kv_heads, -1))  # (kv_heads, group, queries, tokens)
            seen = slice(0, here.shape[-1])
            self.n_queries[layer, seen] += mask[:, self._columns].sum(0)
            if self._mean:
                self.scores[layer, :, seen] += here.mean(1).sum(1)
            else:
                self.scores[layer, :, seen] = torch.maximum(self.scores[layer, :, seen], here.amax((1, 2)))


class SinkRecent:
    """Keeps the first tokens of the document and its last ones (StreamingLLM), the same for all heads."""

    extra_tokens = 0
    budget: Budget = "head"

    def __init__(self, *, n_sink: int = 4) -> None:
        self._n_sink = n_sink
        self.name = f"sink_recent:{n_sink}"

    def score(self, backbone: Backbone, ids: torch.Tensor, cache: PositionedCache) -> torch.Tensor:
        """Score later tokens higher, but the first `n_sink` highest, and the earliest of those best."""
        backbone.prefill(ids, cache)
        n_tokens = ids.shape[1]
        scores = torch.arange(n_tokens, dtype=torch.float32)
        scores[: self._n_sink] = 2 * n_tokens - scores[: self._n_sink]
        return scores


class ObservedAttention:
    """Scores by the attention a token receives during prefill, per layer and KV head (H2O, arXiv 2306.14048).

    The score is the mean over the queries that could see the token. The sum was rejected: the first tokens of every
    document would win for having been visible longest.
    """

    name = "attention"
    extra_tokens = 0
    budget: Budget = "head"

    def score(self, backbone: Backbone, ids: torch.Tensor, cache: PositionedCache) -> torch.Tensor:
        """Mean attention over the queries at or after each token."""
        received = ReceivedAttention(backbone, n_tokens=ids.shape[1], reduce="mean")
        backbone.prefill(ids, cache, context=ForwardContext(observer=received))
        return received.scores / received.n_queries[:, None]


class Reconstruction:
    """Scores by the attention a token receives while the model repeats the document (KVzip, arXiv 2505.23416).

    The document is requested part by part; the score is the maximum over the tokens of the requests and over the query
    heads that share a KV head.

    Args:
        part_tokens: Length of the parts, in tokens.
        budget: Distribution of entries among the heads. `model` as published: heads that look far keep much, most keep
            almost nothing. At the same number of entries in all it is several times closer to the full cache than
            `head`.
    """

    def __init__(self, *, part_tokens: int = 1024, budget: Budget = "model") -> None:
        check_choice(budget, Budget, where="budget")
        self._part = part_tokens
        self.budget = budget
        self.name = f"reconstruction:{part_tokens}:{budget}"
        self.extra_tokens = part_tokens + 64  # the request and its cue

    def score(self, backbone: Backbone, ids: torch.Tensor, cache: PositionedCache) -> torch.Tensor:
        """Highest attention each token receives from the requests to repeat the document."""
        backbone.prefill(ids, cache)
        received = ReceivedAttention(backbone, n_tokens=ids.shape[1], reduce="max")
        for row in repeat_rows(backbone, ids, self._part):
            backbone.prefill(torch.tensor([row]), cache, context=ForwardContext(observer=received))
            cache.rewind(len(row))
        return received.scores


def make_selector(name: SelectorName, *, context_window: int) -> Selector:
    """Create the training-free selector of this name with its default settings, for a model with this context window.

    Raises:
        ConfigError: The name is unknown, or it is `combined`, which needs an adapter.
    """
    check_choice(name, SelectorName, where="selector")
    if name == "combined":
        raise ConfigError("selector 'combined' is not training-free: it needs an adapter", where="selector")
    if name == "matched":  # parts that leave room for the document
        return Matched(MatchSettings(part_tokens=min(1024, context_window // 4)))
    selectors: dict[str, type[Selector]] = {
        "sink_recent": SinkRecent,
        "attention": ObservedAttention,
        "reconstruction": Reconstruction,
    }
    return selectors[name]()
