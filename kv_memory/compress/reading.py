"""Reading documents with an adapter: score, select and route, layer by layer, several documents at once.

Training and compression share this code, so that what is trained is what is used. Where the scorer looks at layer eta
and layers below it are routed too, the scores must be known before the reading begins: two passes. In all other forms
everything is decided on the way: one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kv_memory.attention import NEVER, ForwardContext, PositionedCache
from kv_memory.compress.adapter import Adapter
from kv_memory.compress.early import hidden_after

__all__ = ["Reading", "ReadingDocuments", "pad", "pick_rows", "read_documents"]


def pad(rows: Sequence[Sequence[int]], *, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of several texts, padded on the right with 0: `(batch, longest)`; and their lengths `(batch,)`."""
    lengths = torch.tensor([len(row) for row in rows], device=device)
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device), lengths


def pick_rows(scores: torch.Tensor, n_kept: torch.Tensor) -> torch.Tensor:
    """Positions of each row's highest scores, ascending.

    Args:
        scores: `(layers, batch, heads, n_tokens)`; minus infinity for padding.
        n_kept: `(batch,)`, how many to keep.

    Returns:
        `(layers, batch, heads, most)`, int64; `NEVER` where a row keeps fewer than the most.
    """
    most = int(n_kept.max())
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    surplus = torch.arange(most, device=scores.device) >= n_kept.to(scores.device)[:, None, None]
    return order.masked_fill(surplus, NEVER).sort(dim=-1).values


class ReadingDocuments:
    """What happens in each layer while documents are read; a `Routing`.

    Args:
        adapter: Scores and says which tokens it routes.
        lengths: `(batch,)`, tokens of each document.
        n_kept: `(batch,)`, how many entries to keep of each.
        forced: Bool `(batch, n_tokens)`; these are kept whatever their score.
        routed: False reads with the frozen weights alone, as in selection without the LoRA.
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        lengths: torch.Tensor,
        n_kept: torch.Tensor,
        forced: torch.Tensor | None = None,
        routed: bool = True,
    ) -> None:
        self._adapter = adapter
        self._lengths = lengths
        self._n_kept = n_kept
        self._forced = forced
        self._routed = routed
        self._scores: list[torch.Tensor | None] = [None] * adapter.backbone.num_layers
        self._positions: list[torch.Tensor | None] = [None] * adapter.backbone.num_layers

    def look(self, layer: int, hidden: torch.Tensor) -> None:
        """Score and select from what goes into a layer: for this layer, or for all of them."""
        config = self._adapter.config
        scores = self._adapter.scorer(hidden, layer)
        n = hidden.shape[1]
        real = torch.arange(n, device=hidden.device) < self._lengths[:, None]
        ranked = scores.detach().masked_fill(~real[:, None], -torch.inf)
        if self._forced is not None:
            ranked = ranked.masked_fill(self._forced[:, None], torch.inf)
        positions = pick_rows(ranked, self._n_kept)
        for index in range(config.num_layers) if config.scorer != "layer" else (layer,):
            here = index if scores.shape[0] > 1 else 0
            self._scores[index], self._positions[index] = scores[here], positions[here]

    def enter(self, layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """See `Routing`."""
        config = self._adapter.config
        if config.scorer == "layer" or (layer == config.eta and self._positions[layer] is None):
            self.look(layer, hidden)
        if layer < config.first_routed_layer or not self._routed:
            return None
        if config.routed == "document":
            return torch.ones((), dtype=torch.bool, device=hidden.device)
        positions = self._positions[layer]
        assert positions is not None
        chosen = positions.flatten(1)  # (batch, heads * most)
        mask = torch.zeros(*hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        mask.scatter_add_(1, chosen.clamp(max=hidden.shape[1] - 1), (chosen != NEVER).long())
        return mask > 0

    @property
    def scores(self) -> torch.Tensor:
        """`(num_layers, batch, num_kv_heads or 1, n_tokens)`, float32, with their gradient."""
        return torch.stack([scores for scores in self._scores if scores is not None])

    @property
    def positions(self) -> torch.Tensor:
        """`(num_layers, batch, num_kv_heads or 1, most)`, int64, ascending; `NEVER` for padding."""
        return torch.stack([positions for positions in self._positions if positions is not None])


@dataclass(frozen=True)
class Reading:
    """Documents that were read.

    Attributes:
        cache: Prefix and documents, rotated, padded.
        positions: The selected tokens' positions inside their document: `(num_layers, batch, num_kv_heads or 1, most)`;
            `NEVER` for padding.
        scores: `(num_layers, batch, num_kv_heads or 1, n_tokens)`, float32.
    """

    cache: PositionedCache
    positions: torch.Tensor
    scores: torch.Tensor


def read_documents(
    adapter: Adapter,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    n_kept: torch.Tensor,
    *,
    forced: torch.Tensor | None = None,
    routed: bool = True,
) -> Reading:
    """Read documents behind the shared prefix, score and select their tokens and route what the adapter routes.

    Args:
        adapter: Attached to the model that reads.
        ids: `(batch, n_tokens)`, padded on the right.
        lengths: `(batch,)`.
        n_kept: `(batch,)`, between 1 and each length.
        forced: Bool `(batch, n_tokens)`; these are kept whatever their score.
        routed: False leaves the LoRA out.
    """
    backbone, config = adapter.backbone, adapter.config
    batch, n_tokens = ids.shape
    watching = ReadingDocuments(adapter, lengths=lengths, n_kept=n_kept, forced=forced, routed=routed)
    if config.scorer != "layer" and config.first_routed_layer < config.eta:
        first = backbone.prefixed_cache(n_tokens, batch_size=batch)
        with torch.no_grad():  # the frozen layers below eta: no gradient reaches anything
            hidden = hidden_after(backbone, ids, first, layer=config.eta, lengths=lengths if batch > 1 else None)
        watching.look(config.eta, hidden)
    cache = backbone.prefixed_cache(n_tokens, batch_size=batch)
    backbone.read(ids, cache, lengths=lengths if batch > 1 else None, context=ForwardContext(routing=watching))
    return Reading(cache=cache, positions=watching.positions, scores=watching.scores)
