"""The selector `combined`: what an adapter's scorer says of each entry, and reconstruction attention, together.

The scorer was trained on many documents and knows what questions ask for; it guesses what of this one is looked at. The
model repeating this document (KVzip) shows that, and nothing of questions. Both are on one scale, the logarithm of the
attention that a token receives, so their mean is taken. The model repeats from the entries as the adapter made them:
from those of a plain reading, which would cost one more, the choice was no better.
"""

from __future__ import annotations

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.reading import Reading, choose
from kv_memory.compress.scorer import attention_scores
from kv_memory.compress.selectors import Reconstruction
from kv_memory.errors import ConfigError

__all__ = ["check_combinable", "combined_selection"]

_SCORER = 0.5  # the scorer's share


def check_combinable(adapter: Adapter | None) -> None:
    """Raise unless reconstruction can have a say in what this adapter keeps.

    Raises:
        ConfigError: There is no adapter; or it routes the tokens it keeps, which it must then choose by itself.
    """
    if adapter is None:
        raise ConfigError(
            "selector 'combined' needs an adapter",
            where="selector",
            next_step="Name one (`adapter`, `--adapter`), or use selector 'reconstruction'.",
        )
    if adapter.config.routed == "kept":
        raise ConfigError(
            "selector 'combined' needs an adapter that routes whole documents; this one routes the tokens it keeps",
            where="selector",
            next_step='Leave the choice to the adapter, or train one with `routed="document"`.',
        )


def combined_selection(
    adapter: Adapter,
    selector: Reconstruction,
    ids: torch.Tensor,
    reading: Reading,
    *,
    n_kept: int,
    forced: torch.Tensor,
) -> torch.Tensor:
    """Which entries of one document are kept.

    Args:
        adapter: Has read it.
        selector: Asks the model to repeat it.
        ids: `(1, n_tokens)`.
        reading: Of the document alone, with room for `selector.extra_tokens`. Its cache is left as it was found.
        n_kept: How many, in every head or on average over all of them.
        forced: Bool `(n_tokens,)`; these are kept whatever their score.

    Returns:
        Bool `(num_layers, 1, num_kv_heads, n_tokens)`.
    """
    budget = adapter.config.budget
    received = selector.score(adapter.backbone, ids, reading.cache, None)[:, None].to(reading.scores.device)
    repeated = attention_scores(received, torch.ones_like(received, dtype=torch.bool), budget=budget)
    scores = _SCORER * reading.scores + (1 - _SCORER) * repeated
    lengths, most = torch.tensor([ids.shape[1]]), torch.tensor([n_kept])
    return choose(scores, lengths, most, budget=budget, forced=forced[None])
