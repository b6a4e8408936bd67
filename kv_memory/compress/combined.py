"""The selector `combined`: an adapter's score of each entry, plus the output error that losing the entry would cause.

The scorer was trained on many documents and knows what questions ask for; it only predicts what of this document is
looked at. The output error (`fitting.output_errors`) is measured on this document, and knows nothing about questions.
Half the logarithm of a squared error is on the scorer's scale, that of logarithms of attention, so the two are added.
Errors are those of the entries as the adapter made them. Kept entries are not fitted: on an adapter's entries a fit
did harm at every strength, because it undoes what later layers were trained to expect.
"""

from __future__ import annotations

import torch

from kv_memory.compress.adapter import Adapter
from kv_memory.compress.matching import Matched
from kv_memory.compress.prefill import DocumentPrefill, check_finite, top_k_mask
from kv_memory.errors import ConfigError

__all__ = ["check_combinable", "combined_selection"]

_LEAST = 1e-30  # least error, so that its logarithm is finite


def check_combinable(adapter: Adapter | None) -> None:
    """Raise unless output errors can take part in this adapter's selection.

    Raises:
        ConfigError: There is no adapter, or it routes the tokens it keeps and must therefore select them by itself.
    """
    if adapter is None:
        raise ConfigError(
            "selector 'combined' needs an adapter",
            where="selector",
            next_step="Pass one (`adapter`, `--adapter`), or use selector 'matched'.",
        )
    if adapter.config.routed == "kept":
        raise ConfigError(
            "selector 'combined' needs an adapter that routes whole documents; this one routes the tokens it keeps",
            where="selector",
            next_step='Omit the selector, or train an adapter with `routed="document"`.',
        )


def combined_selection(
    adapter: Adapter,
    selector: Matched,
    ids: torch.Tensor,
    reading: DocumentPrefill,
    *,
    n_kept: int,
    forced: torch.Tensor,
) -> torch.Tensor:
    """Select the entries of one document to keep.

    Args:
        adapter: Adapter that prefilled the document.
        selector: Selector that measures the output errors.
        ids: `(1, n_tokens)`, token ids of the document.
        reading: Prefill of this document alone, with room for `selector.extra_tokens`. Its cache is restored
            afterwards.
        n_kept: Number of entries to keep, in every head or on average over all of them.
        forced: Bool `(n_tokens,)`; tokens that are kept whatever their score.

    Returns:
        Mask of the kept entries, bool `(num_layers, 1, num_kv_heads, n_tokens)`.
    """
    errors = selector.score(adapter.backbone, ids, reading.cache, None)[:, None]
    check_finite(adapter.backbone, errors)
    scores = reading.scores + 0.5 * errors.clamp_min(_LEAST).log().to(reading.scores.device)
    lengths, most = torch.tensor([ids.shape[1]]), torch.tensor([n_kept])
    return top_k_mask(scores, lengths, most, budget=adapter.config.budget, forced=forced[None])
