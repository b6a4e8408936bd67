"""A batch of questions prefilled after composed caches, on which continuations are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kv_memory.cache.distilled import DistilledCache
from kv_memory.config import DecodeSettings, Layout
from kv_memory.generate import Prompt, Run, compose
from kv_memory.model.backbone import Backbone

__all__ = ["PrefilledQuestions", "batches"]

_CPU_BYTES, _GPU_BYTES = 1 << 30, 4 << 30  # size limit of caches and logits of one batch


class PrefilledQuestions:
    """Questions prefilled once; each continuation is prefilled after them and then removed.

    One prefill of the questions thus serves the full model's answer, the reference and every choice.

    Args:
        backbone: The model.
        caches: Distilled caches of the document; empty for the floor.
        prompts: Token ids of each question.
        layout: Placement of documents, see `compose`.
        n_new: Length of the longest continuation, in tokens.

    Raises:
        ContextWindowError: Caches, questions and continuations do not fit the model.
    """

    @torch.no_grad()
    def __init__(
        self,
        backbone: Backbone,
        caches: Sequence[DistilledCache],
        prompts: Sequence[Sequence[int]],
        *,
        layout: Layout,
        n_new: int,
    ) -> None:
        self._backbone, self._caches, self._prompts, self._layout = backbone, caches, prompts, layout
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = _padded(prompts)
        self._cache = compose(
            backbone, caches, layout=layout, n_question=ids.shape[1], n_new=n_new, batch_size=len(prompts)
        )
        ragged = bool((lengths != lengths[0]).any())
        self._first = backbone.logits(ids, self._cache, lengths=lengths if ragged else None)

    def follow(self, rows: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """Log-probabilities at every token of a continuation of each question.

        Args:
            rows: Token ids, one row per question; a row may be empty.

        Yields:
            `(len(row), vocab_size)`, float32. One at a time, because together they are large.
        """
        rest = self._rest(rows)
        for index, row in enumerate(rows):
            logits = self._first[index : index + 1].float()
            if rest is not None and len(row) > 1:
                logits = torch.cat([logits, rest[index, : len(row) - 1].float()])
            yield logits[: len(row)].log_softmax(-1)

    def decode(self, rows: Sequence[int], settings: DecodeSettings) -> list[str]:
        """Answers to some of the questions, decoded by the code that `ask` uses; `follow` is invalid afterwards."""
        self._cache.keep_rows(rows)
        prompts = [Prompt([*self._prompts[row]], behind_prefix=True) for row in rows]
        read = self._cache, self._first[list(rows)]
        run = Run(self._backbone, prompts, self._caches, self._layout, settings, read=read)
        for _ in run.steps():
            pass
        return [generation.text.strip() for generation in run.results()]

    @torch.no_grad()
    def _rest(self, rows: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Logits after every token but the last. Rows are padded at their end, where attention does not reach."""
        width = max(len(row) for row in rows) - 1
        if width < 1:
            return None
        logits = self._backbone.logits(_padded([row[:-1] for row in rows]), self._cache, every=True)
        self._cache.rewind(width)
        return logits


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def batches(backbone: Backbone, n_rows: int, *, n_entries: int, n_tokens: int) -> list[slice]:
    """Rows split into batches whose caches and logits take at most 1 GiB (4 on a GPU), with at least one row each.

    Args:
        backbone: The model.
        n_rows: Number of rows.
        n_entries: Number of entries of the cache that is copied for each row.
        n_tokens: Number of tokens prefilled after it.
    """
    row_bytes = (n_entries + n_tokens) * backbone.kv_bytes_per_token
    row_bytes += n_tokens * int(backbone.config.vocab_size) * backbone.dtype.itemsize
    limit = _CPU_BYTES if backbone.device.type == "cpu" else _GPU_BYTES
    size = max(1, limit // row_bytes)
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
