"""Restore tokens: learned tokens behind a document whose entries hold what the kept entries would lose.

After RestoreKV (arXiv 2608.01247). The document is prefilled plainly; the restore tokens follow it and see all of its
entries, through a LoRA that acts on them alone. So whatever selects and fits the document's entries stays valid, and
in training nothing but the restore tokens needs a gradient. Here their entries compete for the budget with those of
the document, head by head, and each has a learned bias.

All of them stand at the position of the document's last token, so a question stands where it would without them. Moved
on by 4, 8 and 32 positions behind the full cache, `qwen-0.5b` was off by a KL of 0.008, 0.013 and 0.022 (four passages
of SQuAD), which would count where a cache of 1/8 is off by 0.15.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kv_memory.errors import AdapterError, ConfigError
from kv_memory.model.attention import ForwardContext
from kv_memory.model.backbone import Backbone
from kv_memory.model.kv_cache import PositionedCache

if TYPE_CHECKING:
    from kv_memory.compress.adapter import Adapter, AdapterConfig

MOST_RESTORE_TOKENS = 32
_START = " The summary of everything above in short, with names, numbers and dates:"


class RestoreTokens(nn.Module):
    """What is learned of restore tokens besides the LoRA, float32.

    Attributes:
        embeddings: `(m, hidden_size)`, in place of token embeddings.
        bias: `(num_layers, num_kv_heads, m)`, added to the attention logits of their entries.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        m = config.restore_tokens
        self.embeddings = nn.Parameter(torch.zeros(m, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_layers, config.num_kv_heads, m))

    @torch.no_grad()
    def start_from(self, backbone: Backbone) -> None:
        """Start from the embeddings of a request for a summary, repeated as often as needed."""
        ids = torch.tensor(backbone.encode(_START), device=backbone.device)
        embeddings = backbone.model.get_input_embeddings()(ids)  # of some models, scaled
        self.embeddings.copy_(embeddings[torch.arange(len(self.embeddings)) % len(ids)])


class _EveryToken:
    """A `Routing` of all tokens."""

    def enter(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.new_ones(1, 1, dtype=torch.bool)


def restore_of(adapter: Adapter) -> RestoreTokens:
    """The restore tokens of an adapter.

    Raises:
        AdapterError: It has none, but a scorer.
    """
    if not isinstance(adapter.head, RestoreTokens):
        raise AdapterError("the adapter has no restore tokens", where=adapter.config.base_model)
    return adapter.head


def prefill_restore_tokens(adapter: Adapter, cache: PositionedCache) -> None:
    """Prefill an adapter's restore tokens behind each document of a cache, with their gradients."""
    embeddings = restore_of(adapter).embeddings.to(adapter.backbone.dtype)
    rows = embeddings.expand(cache.n_rows, -1, -1)  # (batch, m, hidden_size)
    following = cache.next_positions
    where = (following - 1)[:, None].expand(-1, rows.shape[1])  # (batch, m)
    adapter.backbone.prefill(rows, cache, context=ForwardContext(routing=_EveryToken()), positions=where)
    cache.next_positions = following


def drop_restore_tokens(adapter: Adapter, cache: PositionedCache) -> None:
    """Undo `prefill_restore_tokens`."""
    following = cache.next_positions
    cache.rewind(adapter.config.restore_tokens)
    cache.next_positions = following


def check_restore_tokens(backbone: Backbone, n: int) -> None:
    """Raise a ConfigError unless a model can have `n` restore tokens."""
    if not 0 <= n <= MOST_RESTORE_TOKENS:
        raise ConfigError(
            f"restore_tokens must be in the range 0 to {MOST_RESTORE_TOKENS}, got {n}", where="restore_tokens"
        )
    if n and backbone.rope.varies:
        raise ConfigError(
            f"{backbone.name} has rotary frequencies that depend on the length of the sequence, which restore tokens "
            "do not support",
            where="restore_tokens",
            next_step="Train an adapter with a scorer: restore_tokens=0.",
        )
