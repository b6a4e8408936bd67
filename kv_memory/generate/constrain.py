"""JsonConstraint: allows only tokens that lead to JSON of a given schema.

It uses llguidance: a Rust library without dependencies, maintained by Microsoft's Guidance team and used by llama.cpp,
SGLang and vLLM. outlines-core (compiles an automaton for every schema: seconds), xgrammar (depends on Triton) and
lm-format-enforcer (Python, walks the vocabulary at every token) were rejected.
"""

from __future__ import annotations

import json
import threading
import weakref
from typing import Any

import numpy as np
import torch

from kv_memory.errors import ConfigError
from kv_memory.model.backbone import Backbone

_tokenizers: weakref.WeakKeyDictionary[Backbone, Any] = weakref.WeakKeyDictionary()  # loading a vocabulary takes 0.1 s
_lock = threading.Lock()


class JsonConstraint:
    """Tokens that may follow in one answer that must be JSON.

    Args:
        backbone: The model.
        schema: JSON schema, as a JSON string.

    Raises:
        ConfigError: llguidance is not installed, or does not support the schema.
    """

    def __init__(self, backbone: Backbone, schema: str) -> None:
        try:
            import llguidance
            from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
        except ImportError as error:
            raise ConfigError(
                "answers by a JSON schema need llguidance, which is not installed",
                where="json_schema",
                next_step="Run `pip install 'kv-memory[structured]'`.",
            ) from error
        try:
            json.loads(schema)
            # Only JSON's default white space: with flexible white space a small model would emit it without end.
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
        except ValueError as error:
            raise _refused(str(error)) from error
        self._matcher = llguidance.LLMatcher(_tokenizer_of(backbone), grammar)
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())
        self._bits = allocate_token_bitmask(1, backbone.config.vocab_size)
        self._fill = fill_next_token_bitmask

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits, `(vocab_size,)`, with those of disallowed tokens at minus infinity."""
        self._fill(self._matcher, self._bits)
        allowed = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")[: logits.shape[-1]]
        return logits.masked_fill(~torch.from_numpy(allowed.astype(bool)).to(logits.device), -torch.inf)

    def push(self, token: int) -> bool:
        """Accept the token that was picked; returns True if the JSON is complete with it."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())


def _tokenizer_of(backbone: Backbone) -> Any:
    from llguidance.hf import from_tokenizer

    with _lock:
        found = _tokenizers.get(backbone)
        if found is None:
            size = max(backbone.config.vocab_size, len(backbone.tokenizer))
            found = _tokenizers[backbone] = from_tokenizer(backbone.tokenizer, n_vocab=size)
        return found


def _refused(why: str) -> ConfigError:
    return ConfigError(
        f"this JSON schema cannot be followed: {why.strip()}",
        where="json_schema",
        next_step="Use types, properties, enums, arrays and numbers; see llguidance's list of JSON schema features.",
    )
