"""The selector `combined`: what an adapter's scorer says of each entry, and what its loss would do to the output.

The scorer was trained on many documents and knows what questions ask for; it guesses what of this one is looked at. The
change of the output (`matching.output_errors`) is measured on this document, and knows nothing of questions. Half the
logarithm of a squared error is on the scorer's scale, that of logarithms of attention; their sum is taken. Errors are
those of the entries as the adapter made them. What is kept is not fitted: on an adapter's entries that did harm at
every strength, because it undoes what later layers were taught to expect.
"""

from __future__ import annotations

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.matching import Matched
from kv_memory.compress.prefill import Reading, check_finite, choose
from kv_memory.errors import ConfigError

__all__ = ["check_combinable", "combined_selection"]

_LEAST = 1e-30  # of an error, for its logarithm


def check_combinable(adapter: Adapter | None) -> None:
    """Raise unless the change of the output can have a say in what this adapter keeps.

    Raises:
        ConfigError: There is no adapter; or it routes the tokens it keeps, which it must then choose by itself.
    """
    if adapter is None:
        raise ConfigError(
            "selector 'combined' needs an adapter",
            where="selector",
            next_step="Name one (`adapter`, `--adapter`), or use selector 'matched'.",
        )
    if adapter.config.routed == "kept":
        raise ConfigError(
            "selector 'combined' needs an adapter that routes whole documents; this one routes the tokens it keeps",
            where="selector",
            next_step='Leave the choice to the adapter, or train one with `routed="document"`.',
        )


def combined_selection(
    adapter: Adapter,
    selector: Matched,
    ids: torch.Tensor,
    reading: Reading,
    *,
    n_kept: int,
    forced: torch.Tensor,
) -> torch.Tensor:
    """Which entries of one document are kept.

    Args:
        adapter: Has read it.
        selector: Measures what the loss of each entry would do.
        ids: `(1, n_tokens)`.
        reading: Of the document alone, with room for `selector.extra_tokens`. Its cache is left as it was found.
        n_kept: How many, in every head or on average over all of them.
        forced: Bool `(n_tokens,)`; these are kept whatever their score.

    Returns:
        Bool `(num_layers, 1, num_kv_heads, n_tokens)`.
    """
    errors = selector.score(adapter.backbone, ids, reading.cache, None)[:, None]
    check_finite(adapter.backbone, errors)
    scores = reading.scores + 0.5 * errors.clamp_min(_LEAST).log().to(reading.scores.device)
    lengths, most = torch.tensor([ids.shape[1]]), torch.tensor([n_kept])
    return choose(scores, lengths, most, budget=adapter.config.budget, forced=forced[None])
