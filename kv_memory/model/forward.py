"""Forward passes of a language model over caches in which every entry has a position of its own."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kv_memory.errors import ModelError
from kv_memory.model.attention import ATTENTION, ForwardContext, PackedRow, soft_capped
from kv_memory.model.int8_weights import int8_weights
from kv_memory.model.kv_cache import NEVER, PackedCache, PositionedCache
from kv_memory.model.rope import Rope


def cache_argument(forward: Callable[..., Any]) -> str:
    """Name of the cache argument of a Transformers forward pass: `cache` from 5.24 on, `past_key_values` before.

    The signature decides. The release number was rejected: a model's code may live outside Transformers and change
    independently.
    """
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


class ForwardPasses:
    """The forward passes of a `Backbone`, safe to use from several threads.

    Args:
        model: A Transformers causal LM of a supported architecture. It computes attention by `attention_forward` from
            now on, and its parameters are frozen.
    """

    name: str

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = config = model.config
        self.lock = threading.RLock()  # rotary modules and routed layers hold state during a forward pass
        self.decoder: nn.Module = model.get_decoder()
        self.layers: Sequence[nn.Module] = self.decoder.layers
        self._cache_arguments = {module: cache_argument(module.forward) for module in (self.model, self.decoder)}
        per_layer = isinstance(getattr(self.decoder.rotary_emb, "rope_type", None), dict)
        self.rope = Rope(
            self.decoder.rotary_emb,
            layer_types=list(config.layer_types) if per_layer else [None] * config.num_hidden_layers,
            lock=self.lock,
        )
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        model.set_attn_implementation(ATTENTION)
        self._pid = os.getpid()

    def check_process(self) -> None:
        """Refuse to compute in a forked child, where the threads that torch has started are missing: it would hang.

        Raises:
            ModelError: The model was loaded by the parent, which computes with several threads or on a GPU.
        """
        if os.getpid() != self._pid and (torch.get_num_threads() > 1 or self.device.type != "cpu"):
            raise ModelError(
                "the model was loaded before this process was forked",
                where=self.name,
                next_step="Open the memory in each process after it has started, or start processes by `spawn`. With "
                "torch.set_num_threads(1) before the fork, a model on the CPU works in the child too.",
            )

    def prefill(
        self,
        ids: torch.Tensor,
        cache: PositionedCache,
        *,
        lengths: torch.Tensor | None = None,
        context: ForwardContext | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Prefill tokens into a cache, without computing logits; arguments as in `logits`.

        With `positions` of the tokens, `(batch, n)`, they do not follow the cache's last token.

        Returns:
            `(batch, n, hidden_size)`, input of the language model head.
        """
        out = self._forward(self.decoder, ids, cache, lengths=lengths, context=context, positions=positions)
        return out[0]  # type: ignore[no-any-return]

    def logits(
        self,
        ids: torch.Tensor,
        cache: PositionedCache,
        *,
        lengths: torch.Tensor | None = None,
        every: bool = False,
        context: ForwardContext | None = None,
    ) -> torch.Tensor:
        """Prefill tokens into a cache and return the logits for the next token.

        Args:
            ids: `(batch, n)` token ids, padded on the right; or their embeddings, `(batch, n, hidden_size)`.
            cache: Cache to extend by `n` entries.
            lengths: `(batch,)`, real tokens per row; None if no row has padding.
            every: Return the logits after every token, not only after the last.
            context: Observer and routing; its cache is set here.

        Returns:
            `(batch, vocab_size)`, or `(batch, n, vocab_size)` with `every`; in the model's dtype.
        """
        last = torch.full((ids.shape[0],), ids.shape[1]) if lengths is None else lengths.cpu()
        wanted, row_of = torch.unique(last - 1, return_inverse=True)
        keep = 0 if every else wanted.to(self.device)
        with int8_weights():  # without effect on a model that has none
            out = self._forward(self.model, ids, cache, lengths=lengths, context=context, logits_to_keep=keep)
        logits: torch.Tensor = out.logits
        return logits if every else logits[torch.arange(len(row_of)), row_of.to(logits.device)]

    def packed_logits(
        self, rows: Sequence[tuple[Sequence[int], PositionedCache]], *, every: bool = False
    ) -> torch.Tensor:
        """`logits` for several requests, each with tokens and a cache of its own, without any padding.

        All tokens make up one packed sequence. Linear layers, whose weights are the larger part of what a decoding
        step loads, compute them together; attention is computed request by request.

        Args:
            rows: Token ids and cache of each request; a cache has one row.
            every: Return the logits after every token, not only after the last of each request.

        Returns:
            `(len(rows), vocab_size)`, or with `every` `(total number of tokens, vocab_size)`, request after request.
        """
        if len(rows) == 1:
            return self.logits(torch.tensor([rows[0][0]]), rows[0][1], every=every).flatten(0, -2)
        # Rotary modules have one set of frequencies for the whole sequence: requests that need others go apart.
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, (ids, cache) in enumerate(rows):
            n_positions = int(cache.next_positions) + len(ids) if self.rope.varies else 0
            groups.setdefault(self.rope.regime(n_positions), []).append(index)
        parts = [self._packed([rows[index] for index in group], every=every) for group in groups.values()]
        if len(parts) == 1:
            return parts[0]
        found: dict[int, torch.Tensor] = {}
        for group, logits in zip(groups.values(), parts, strict=True):
            found.update(zip(group, logits.split([len(rows[i][0]) if every else 1 for i in group]), strict=True))
        return torch.cat([found[index] for index in range(len(rows))])

    def _packed(self, rows: Sequence[tuple[Sequence[int], PositionedCache]], *, every: bool) -> torch.Tensor:
        packed: list[PackedRow] = []
        end = 0
        for ids, cache in rows:
            n, start = len(ids), end
            end += n
            packed.append(PackedRow(slice(start, end), self._enter(cache, n), ForwardContext(cache=cache)))
        positions = torch.cat([row.positions for row in packed], dim=1)  # (1, total)
        tokens = torch.tensor([[token for ids, _ in rows for token in ids]], device=self.device)
        keep = 0 if every else torch.tensor([row.tokens.stop - 1 for row in packed], device=self.device)
        context = ForwardContext(packed=packed)
        with int8_weights():
            out = self._call(self.model, tokens, positions, PackedCache(), context, logits_to_keep=keep)
        for ids, cache in rows:
            cache.next_positions = cache.next_positions + len(ids)
        return out.logits[0]  # type: ignore[no-any-return]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states from `prefill`: `(..., hidden_size)` to `(..., vocab_size)`."""
        logits: torch.Tensor = self.model.get_output_embeddings()(hidden)
        return soft_capped(logits, getattr(self.config, "final_logit_softcapping", None))

    def _forward(
        self,
        module: Any,
        ids: torch.Tensor,
        cache: PositionedCache,
        *,
        lengths: torch.Tensor | None,
        context: ForwardContext | None,
        positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        ids = ids.to(self.device)  # (batch, n), or (batch, n, hidden_size)
        n = ids.shape[1]
        positions = self._enter(cache, n, positions=positions, lengths=lengths)
        context = context or ForwardContext()
        context.cache = cache
        context.masks.clear()  # they depend on the positions: those of an earlier pass are wrong
        out = self._call(module, ids, positions, cache, context, **kwargs)
        cache.next_positions = cache.next_positions + (n if lengths is None else lengths.to(self.device))
        return out

    def _enter(
        self,
        cache: PositionedCache,
        n: int,
        *,
        positions: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Record `n` tokens that are about to be prefilled into a cache; their positions, `(batch, n)`."""
        self.check_process()
        # 1. Positions continue after each row's last token; with length-dependent frequencies, rotate the keys again.
        if positions is None:
            positions = cache.next_positions[:, None] + torch.arange(n, device=self.device)  # (batch, n)
        if self.rope.varies:  # otherwise skipped: reading `max` back would stall the GPU
            cache.rerotate(self.rope, int(positions.max()) + 1)
        # 2. Record the positions of the new entries; padding gets `NEVER`.
        if lengths is None:
            cache.append_positions(positions)
        else:
            real = torch.arange(n, device=self.device) < lengths.to(self.device)[:, None]
            cache.append_positions(positions.masked_fill(~real, NEVER))
            cache.appended_padding = True
        return positions

    def _call(
        self,
        module: Any,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        context: ForwardContext,
        **kwargs: Any,
    ) -> Any:
        inputs = {"inputs_embeds" if ids.is_floating_point() else "input_ids": ids}
        with self.lock:
            return module(
                **inputs,
                position_ids=positions,
                use_cache=True,
                kv_memory=context,
                **{self._cache_arguments[module]: cache},
                **kwargs,
            )
