"""The teacher of refinement: documents with their full caches, from which texts are decoded and predictions taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from kv_memory.compress.kept import pad
from kv_memory.compress.refine.batching import Entries, Row, RowBatch, batch_rows, gather_entries
from kv_memory.model.backbone import Backbone
from kv_memory.model.first_token import FirstToken
from kv_memory.model.int8_weights import plain_weights
from kv_memory.model.kv_cache import PositionedCache

_DECODED_TOKENS = 4096  # most prompt tokens of the rows that are decoded as one batch


def stop_ids(backbone: Backbone) -> set[int]:
    """Tokens that end an answer: the end token, and the first token of each of the prompt form's stop strings."""
    stops = {ids[0] for stop in backbone.prompt.stop if (ids := backbone.encode(stop))}
    end = backbone.tokenizer.eos_token_id
    return stops if end is None else {*stops, end}


class Teacher:
    """Documents prefilled once, behind which any number of rows are run side by side.

    Args:
        backbone: The model.
        documents: Token ids of each document, wrappers included.
        room: Length of the longest row behind a document, in tokens.
        max_entries: Most cache entries to copy at once. A document longer than that is alone, and its rows run one by
            one in its own cache: nothing is copied then, and memory stays that of a prefill.
    """

    @torch.no_grad()
    def __init__(self, backbone: Backbone, documents: Sequence[Sequence[int]], *, room: int, max_entries: int) -> None:
        self._backbone = backbone
        ids, lengths = pad(documents, device=backbone.device)
        n = len(documents)
        self._at_once = max(1, max_entries // (len(backbone.prefix_ids) + ids.shape[1] + room))
        alone = n == 1 and self._at_once == 1
        cache = backbone.prefixed_cache(ids.shape[1], room=room if alone else 0, batch_size=n)
        backbone.prefill(ids, cache, lengths=lengths if n > 1 else None)
        self._cache = cache
        self._ends = (lengths + len(backbone.prefix_ids)).tolist()
        self._entries: Entries | None = None if alone else gather_entries(backbone, cache)

    @contextmanager
    def _behind(self, documents: torch.Tensor) -> Iterator[PositionedCache]:
        """Yield a cache with one row for each of `documents`, to be used once."""
        if self._entries is not None:
            yield self._entries.cache(documents)
            return
        before = self._cache.appended_positions.shape[1]
        try:
            yield self._cache
        finally:
            self._cache.rewind(self._cache.appended_positions.shape[1] - before)

    @torch.no_grad()
    def logits(self, rows: Sequence[Row]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield what the full cache predicts, row by row, because the logits of all rows at once are large.

        Yields:
            Index of a row, in any order, and its logits `(n_wanted, vocab_size)`, in the model's dtype.
        """
        for batch in batch_rows(self._backbone, rows, self._ends, at_once=self._at_once):
            with self._behind(batch.documents) as cache:
                hidden = batch.hidden(self._backbone, cache)
            sizes = [rows[index].n_wanted for index in batch.index]
            for index, part in zip(batch.index, hidden.split(sizes), strict=True):
                yield index, self._backbone.head(part)

    @torch.no_grad()
    def decode(
        self,
        rows: Sequence[Row],
        *,
        most: int,
        ends: set[int],
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
        as_answers: bool = False,
    ) -> list[list[int]]:
        """Continue each row, of which nothing is predicted; return the new tokens of each.

        Args:
            rows: Rows to continue.
            most: Most tokens to decode.
            ends: Tokens that end a text; the end token is part of the result.
            temperature: Sampling temperature; 0 takes the likeliest token.
            seeds: Seed of each row, so that a text does not depend on its batch; needed above temperature 0.
            as_answers: True for texts that begin with something visible, as answers to users do, see `FirstToken`.
        """
        found: dict[int, list[int]] = {}
        # Each decoding step loads all weights from memory: the more rows share that, the better.
        for batch in batch_rows(self._backbone, rows, self._ends, at_once=self._at_once, max_tokens=_DECODED_TOKENS):
            # Noise is drawn on the CPU, so that a seed gives the same noise on every device.
            draws = [torch.Generator().manual_seed(seeds[i]) for i in batch.index] if temperature and seeds else None
            last = batch.ids.gather(1, batch.lengths[:, None] - 1).flatten().tolist()
            openings = [FirstToken(tokenizer=self._backbone.tokenizer, end_ids=ends, behind=token) for token in last]
            with self._behind(batch.documents) as cache, plain_weights():  # caches do not depend on int8 weights
                texts = self._go_on(batch, cache, most, ends, openings if as_answers else None, draws, temperature)
            found.update(zip(batch.index, texts, strict=True))
        return [found[index] for index in range(len(rows))]

    def _go_on(
        self,
        batch: RowBatch,
        cache: PositionedCache,
        most: int,
        ends: set[int],
        openings: Sequence[FirstToken] | None,
        draws: Sequence[torch.Generator] | None,
        temperature: float,
    ) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in batch.index]
        rows = list(range(len(texts)))  # still being decoded
        logits = self._backbone.logits(batch.ids, cache, lengths=batch.lengths if len(texts) > 1 else None)
        for step in range(most):
            scores = logits.float()
            if draws is not None:
                noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=draws[row]) for row in rows])
                noise = noise.clamp(min=1e-30).to(scores.device)
                scores = scores / temperature - noise.log()  # Gumbel trick: the argmax is a sample
            tokens = scores.argmax(-1)
            for i, row in enumerate(rows):
                if openings is not None and not openings[row].has_begun(texts[row]):
                    tokens[i] = openings[row].likeliest(scores[i], texts[row])
                texts[row].append(int(tokens[i]))
            going = [i for i, row in enumerate(rows) if texts[row][-1] not in ends]
            if step + 1 == most or not going:
                break
            if len(going) < len(rows):
                cache.keep_rows(going)
                rows, tokens = [rows[i] for i in going], tokens[going]
            logits = self._backbone.logits(tokens[:, None], cache)
        return texts
