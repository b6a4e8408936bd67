"""Prefill with an adapter: score, select and route, layer by layer, for several documents at once.

Training and compression share this code, so that what is trained is what is used. Where the scorer looks at layer eta
and layers below it are routed too, the scores must be known before routing begins, which takes two passes. In all
other forms everything is decided during one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.kept import top_k_mask
from kv_memory.model.attention import ForwardContext
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache


@dataclass(kw_only=True, eq=False)
class PrefillRouting:
    """Scores, selects and routes in each layer while documents are prefilled; a `Routing`.

    Attributes:
        adapter: Adapter that scores, and that decides which tokens are routed.
        lengths: `(batch,)`, tokens of each document.
        n_kept: `(batch,)`, number of entries to keep of each document, see `top_k_mask`.
        forced: Bool `(batch, n_tokens)`; tokens that are kept whatever their score.
        routed: True to use the LoRA; False prefills with the frozen weights alone, for selection without the LoRA.
    """

    adapter: Adapter
    lengths: torch.Tensor
    n_kept: torch.Tensor
    forced: torch.Tensor | None = None
    routed: bool = True

    def __post_init__(self) -> None:
        self._strength = self.adapter.config.strength(self.n_kept / self.lengths)[:, None]  # (batch, 1)
        self._scores: list[torch.Tensor | None] = [None] * self.adapter.backbone.num_layers
        self._selected: torch.Tensor | None = None  # for all layers at once; None with scorers of the kind `layer`

    def look(self, layer: int, hidden: torch.Tensor) -> None:
        """Score from the input of a layer: for this layer, or for all layers."""
        scores = self.adapter.scorer(hidden, layer)
        if self.adapter.config.scorer == "layer":
            self._scores[layer] = scores[0]
            return
        self._scores = [scores[index if scores.shape[0] > 1 else 0] for index in range(len(self._scores))]
        self._selected = self._choose(scores)

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        budget = self.adapter.config.budget
        return top_k_mask(scores, self.lengths, self.n_kept, budget=budget, forced=self.forced)

    def enter(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Score and select where it is due, and return the mask of this layer; see `Routing`."""
        config = self.adapter.config
        if config.scorer == "layer" or (layer == config.eta and self._selected is None):
            self.look(layer, hidden)
        if layer < config.first_routed_layer or not self.routed:
            return None
        strength = self._strength.to(hidden.device)
        if config.routed == "document":
            return strength
        if self._selected is None:
            scores = self._scores[layer]
            assert scores is not None
            return self._choose(scores[None])[0].any(1) * strength
        return self._selected[layer if self._selected.shape[0] > 1 else 0].any(1) * strength

    @property
    def scores(self) -> torch.Tensor:
        """Scores `(num_layers, batch, num_kv_heads or 1, n_tokens)`, float32, with their gradient."""
        return torch.stack([scores for scores in self._scores if scores is not None])

    @property
    def selected(self) -> torch.Tensor:
        """Mask of the kept entries, bool `(num_layers or 1, batch, num_kv_heads or 1, n_tokens)`."""
        return self._choose(self.scores) if self._selected is None else self._selected


class DocumentPrefill(NamedTuple):
    """Prefilled documents with their scores and selection; shapes as in `PrefillRouting`."""

    cache: PositionedCache  # of prefix and documents, rotated, padded
    selected: torch.Tensor
    scores: torch.Tensor


def prefill_documents(
    adapter: Adapter,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    n_kept: torch.Tensor,
    *,
    forced: torch.Tensor | None = None,
    routed: bool = True,
    room: int = 0,
) -> DocumentPrefill:
    """Prefill documents behind the shared prefix, score and select their tokens, and route what the adapter routes.

    `ids` are token ids, `(batch, n_tokens)`, padded on the right, and `room` is the number of further tokens that the
    cache must hold behind the documents. The other arguments are those of `PrefillRouting`.
    """
    backbone, config = adapter.backbone, adapter.config
    batch, n_tokens = ids.shape
    watching = PrefillRouting(adapter=adapter, lengths=lengths, n_kept=n_kept, forced=forced, routed=routed)
    if config.scorer != "layer" and config.first_routed_layer < config.eta:
        first = backbone.prefixed_cache(n_tokens, batch_size=batch)
        with torch.no_grad():  # the layers below eta are frozen here: nothing to train
            hidden = hidden_after(backbone, ids, first, layer=config.eta, lengths=lengths if batch > 1 else None)
        watching.look(config.eta, hidden)
    cache = backbone.prefixed_cache(n_tokens, room=room, batch_size=batch)
    backbone.prefill(ids, cache, lengths=lengths if batch > 1 else None, context=ForwardContext(routing=watching))
    return DocumentPrefill(cache, watching.selected, watching.scores)


def hidden_after(
    backbone: Backbone, ids: torch.Tensor, cache: PositionedCache, *, layer: int, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Run only the first `layer` decoder layers, and return the output of the last of them.

    Arguments as in `Backbone.prefill`; the cache must not be used afterwards.

    Returns:
        Hidden states `(batch, n, hidden_size)`, in the model's dtype.
    """
    caught: list[torch.Tensor] = []

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise _EnoughRead

    # Leaving by an exception runs exactly the requested layers on every architecture. Truncating `decoder.layers` was
    # rejected: it would change the model for other threads too. The lock is held because the hook would also stop a
    # forward pass of another thread.
    with backbone.lock:
        handle = backbone.layers[layer - 1].register_forward_hook(stop)
        try:
            backbone.prefill(ids, cache, lengths=lengths)
        except _EnoughRead:
            pass
        finally:
            handle.remove()
    return caught[0]


class _EnoughRead(Exception):  # noqa: N818 (not an error)
    """Raised to leave a forward pass once the wanted layer has run."""
