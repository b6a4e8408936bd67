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
from kv_memory.compress.match_settings import MatchSettings
from kv_memory.compress.matching import Matched
from kv_memory.compress.prefill import DocumentPrefill
from kv_memory.errors import ConfigError
from kv_memory.model.backbone import Backbone

_LEAST = 1e-30  # least error, so that its logarithm is finite


def combined_selector(adapter: Adapter | None) -> Matched:
    """Return the selector that measures output errors beside this adapter.

    Raises:
        ConfigError: There is no adapter, or it routes the tokens it keeps and must therefore select them by itself.
    """
    if adapter is None:
        raise ConfigError(
            "selector 'combined' needs an adapter",
            where="selector",
            next_step="Pass one (`adapter`, `--adapter`), or use selector 'matched'.",
        )
    if adapter.config.restore_tokens:
        raise ConfigError(
            "selector 'combined' needs an adapter with a scorer; this one has restore tokens",
            where="selector",
            next_step="Use selector 'matched'.",
        )
    if adapter.config.routed == "kept":
        raise ConfigError(
            "selector 'combined' needs an adapter that routes whole documents; this one routes the tokens it keeps",
            where="selector",
            next_step='Omit the selector, or train an adapter with `routed="document"`.',
        )
    part_tokens = min(1024, adapter.backbone.context_window // 4)
    # No depth weight: the adapter's scorer already weighs the layers.
    return Matched(MatchSettings(part_tokens=part_tokens, depth_weight=0.0, fit=False))


def combined_scores(backbone: Backbone, selector: Matched, ids: torch.Tensor, reading: DocumentPrefill) -> torch.Tensor:
    """Scores of the entries of one document, `(num_layers, 1, num_kv_heads, n_tokens)`.

    `reading` is the adapter's prefill of this document alone, `ids` `(1, n_tokens)`, with room for
    `selector.extra_tokens`. Its cache is restored afterwards.
    """
    errors = selector.documents(backbone, ids, reading.cache)[0].scores[:, None]
    return reading.scores + 0.5 * errors.clamp_min(_LEAST).log().to(reading.scores.device)
