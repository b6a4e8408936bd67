"""The student of an adapter with restore tokens: its entries, chosen without a fit, and their gradients."""

from __future__ import annotations

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.kept import top_k_mask
from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.matching import Matched
from kv_memory.compress.refine.batching import Entries, gather_entries
from kv_memory.compress.restore import drop_restore_tokens, prefill_restore_tokens, restore_of
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache

_EXPLORED = 0.5  # largest share of the budget that goes to restore tokens whatever their scores


def output_selector(backbone: Backbone) -> Matched:
    """The selector whose scores, output errors, choose the entries in training: `matched` without stages and fit."""
    return Matched(MatchSettings(part_tokens=min(1024, backbone.context_window // 4), fit=False))


@torch.no_grad()
def restore_scores(adapter: Adapter, ids: torch.Tensor, lengths: torch.Tensor, cache: PositionedCache) -> torch.Tensor:
    """Output errors of the entries of prefilled documents and of the restore tokens behind them.

    Args:
        adapter: Adapter with `m` restore tokens.
        ids: `(documents, n)`, token ids, padded on the right.
        lengths: `(documents,)`, real tokens of each document.
        cache: Their cache, with room for `output_selector` and the restore tokens; it is restored afterwards.

    Returns:
        `(num_layers, documents, num_kv_heads, n + m)`, float32; -inf for padding, which stands before restore tokens.
    """
    m, selector = adapter.config.restore_tokens, output_selector(adapter.backbone)
    ragged = lengths if len(ids) > 1 else None
    documents = selector.documents(adapter.backbone, ids, cache, lengths=ragged, restore=adapter)
    drop_restore_tokens(adapter, cache)
    found = []
    for one in documents:
        own, restored = one.scores.split([one.scores.shape[-1] - m, m], -1)
        padding = own.new_full((*own.shape[:2], ids.shape[1] - own.shape[-1]), -torch.inf)
        found.append(torch.cat([own, padding, restored], -1))
    return torch.stack(found, 1)


def restored_entries(
    adapter: Adapter, cache: PositionedCache, scores: torch.Tensor, n_kept: torch.Tensor, *, seed: int | None = None
) -> Entries:
    """The best entries of documents and restore tokens, with the gradients of the latter.

    With a seed, the restore tokens of some heads drawn from it are kept whatever their scores, with up to half of the
    budget: a restore token that nobody sees would learn nothing.

    Args:
        adapter: Adapter with restore tokens.
        cache: Cache of the prefilled documents; afterwards it also holds the restore tokens.
        scores: Scores from `restore_scores`.
        n_kept: `(documents,)`, number of entries to keep, on average over layers and heads.
        seed: Seed of the draw; None for none.
    """
    # 1. Selection. A share of the heads, up to where they take half of the budget.
    m = adapter.config.restore_tokens
    ranked = scores.clone()
    if seed is not None:
        draw = torch.Generator().manual_seed(seed)
        most = (_EXPLORED * n_kept.cpu() / m).clamp(max=1)  # (documents,)
        share = torch.rand(len(most), generator=draw) * most
        shown = torch.rand(scores.shape[:3], generator=draw) < share[:, None]  # (num_layers, documents, num_kv_heads)
        ranked[..., -m:].masked_fill_(shown.to(ranked.device)[..., None], torch.inf)
    width = torch.full_like(n_kept, scores.shape[-1])
    selected = top_k_mask(ranked, width, n_kept, budget="model")
    # 2. The restore tokens with their gradients, and their biases.
    prefill_restore_tokens(adapter, cache)
    bias = torch.nn.functional.pad(restore_of(adapter).bias[:, None], (scores.shape[-1] - m, 0))
    return gather_entries(adapter.backbone, cache, selected, bias.expand(-1, scores.shape[1], -1, -1))
