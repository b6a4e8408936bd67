"""Backbone: a causal language model, its tokenizer, its prompt form, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kv_memory.cache.distilled import dtype_from_name, dtype_name
from kv_memory.cache.fingerprint import FORMATS, Fingerprint
from kv_memory.config import DtypeName, WeightsName, check_choice
from kv_memory.errors import ContextWindowError
from kv_memory.model.embedded import EMBEDDED, built_in, concrete_name
from kv_memory.model.forward import ForwardPasses
from kv_memory.model.hot import HotCaches
from kv_memory.model.int8_weights import add_int8_weights
from kv_memory.model.kv_cache import PositionedCache, Prefix
from kv_memory.model.loading import best_device, best_dtype, check_device, check_supported, hash_parameters, load_model
from kv_memory.model.prompts import PromptEncoder, PromptForm, PromptName, choose_form


class Backbone(PromptEncoder, ForwardPasses):
    """A causal language model that prefills documents and answers questions.

    The model is never changed. Its weights stay frozen, and an attached adapter acts only on tokens that a compressor
    routes through it.

    Args:
        model: A Transformers causal LM of a supported architecture, in evaluation mode.
        tokenizer: Tokenizer of the model.
        prompt: A `PromptForm`, or one of `chat`, `brief`, `passage` and `auto`. `auto` is the model's chat template,
            or `passage` if it has none.
        name: Name of the model in errors and listings.
        weights_sha256: Hash of the weights, if known; else computed from the parameters.
        weights: Weights of questions and answers, see `load`.

    Attributes:
        kv_bytes_per_token: Size of one token in an uncompressed cache, in bytes.
        hot: Composed caches that stay in memory; none unless it is given a limit.
        weights: `int8` if questions and answers use int8 weights, see `load`; else `plain`.

    Raises:
        UnsupportedModelError: The architecture is not supported; the message names those that are.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        prompt: PromptName | PromptForm = "auto",
        chat_options: Mapping[str, Any] | None = None,
        name: str | None = None,
        weights_sha256: str | None = None,
        weights: WeightsName = "plain",
    ) -> None:
        config = model.config
        self.name: str = name or getattr(config, "_name_or_path", "") or type(model).__name__
        check_supported(config.model_type, where=self.name)
        PromptEncoder.__init__(self, tokenizer, choose_form(prompt, tokenizer, chat_options))
        ForwardPasses.__init__(self, model)
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.hidden_size: int = config.hidden_size
        self.context_window: int = config.max_position_embeddings
        self.weights_sha256 = weights_sha256 or hash_parameters(model)
        self.kv_bytes_per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        self.hot = HotCaches()
        check_choice(weights, WeightsName, where="weights")
        self.weights: WeightsName = weights
        if weights == "int8":
            add_int8_weights(model)
        self._prefix: Prefix | None = None

    @classmethod
    def load(
        cls,
        name: str | Path = EMBEDDED,
        *,
        dtype: DtypeName = "auto",
        device: str = "auto",
        weights: WeightsName = "plain",
        prompt: PromptName | PromptForm = "auto",
        chat_options: Mapping[str, Any] | None = None,
        revision: str | None = None,
    ) -> Backbone:
        """Load a model by name.

        Args:
            name: Name of a built-in model, a local folder, or a Hugging Face hub id. `embedded` is the first of
                `qwen-0.5b` and `smollm2` that is prepared.
            dtype: Dtype of the weights; `auto` is bfloat16 if the processor or GPU supports it in hardware, else
                float32.
            device: Torch device such as `cuda:1`; `auto` is a GPU if there is one, else the CPU.
            weights: Weights of questions and answers: `plain`, or `int8` on a CPU, 0.6 of the time a token and a little
                less exact. Documents are compressed with the plain weights either way, so a cache does not depend on
                this option. The int8 weights take half the memory of bfloat16, in addition.
            prompt: Prompt form, see `Backbone`; `auto` is the best form of a built-in model.
            chat_options: Variables of the model's chat template, e.g. `{"enable_thinking": True}`.
            revision: Revision of a hub id.

        Raises:
            ConfigError: The device cannot be used, or not for int8 weights; `weights` is unknown.
            ModelNotFoundError: The model does not exist.
            UnsupportedModelError: The model has no usable tokenizer; the model's architecture is not supported.
        """
        check_choice(weights, WeightsName, where="weights")
        device = best_device() if device == "auto" else check_device(device)
        torch_dtype = best_dtype(device) if dtype == "auto" else dtype_from_name(dtype)
        name = concrete_name(str(name))
        model, tokenizer, sha256 = load_model(name, dtype=torch_dtype, device=device, revision=revision)
        if prompt == "auto" and (found := built_in(name)):
            prompt = found.prompt
        return cls(
            model,
            tokenizer,
            prompt=prompt,
            chat_options=chat_options,
            name=name,
            weights_sha256=sha256,
            weights=weights,
        )

    def fingerprint(
        self,
        *,
        method: str,
        adapter: str = "",
        eta: int | None = None,
        keep_spans: str = "",
        format_version: int = FORMATS[0],
    ) -> Fingerprint:
        """Fingerprint of the caches of this model and method; arguments as in `Fingerprint`."""
        return replace(
            self._plain_fingerprint,
            method=method,
            adapter=adapter,
            eta=eta,
            keep_spans=keep_spans,
            format_version=format_version,
        )

    @cached_property
    def _plain_fingerprint(self) -> Fingerprint:
        rope = json.dumps(getattr(self.config, "rope_parameters", None) or {}, sort_keys=True)
        prefix = ",".join(map(str, self.prefix_ids))
        return Fingerprint(
            format_version=FORMATS[0],
            architecture=self.config.model_type,
            weights=self.weights_sha256,
            tokenizer=self.tokenizer_sha256,
            prompt=self.prompt.digest,
            prefix=hashlib.sha256(prefix.encode()).hexdigest(),
            method="",
            adapter="",
            eta=None,
            rope=hashlib.sha256(rope.encode()).hexdigest(),
            dtype=dtype_name(self.dtype),
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
        )

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's end token and those of the model's generation settings."""
        config = getattr(self.model, "generation_config", None)
        ids: list[int] = []
        for value in (self.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
            ids += value if isinstance(value, list) else [] if value is None else [value]
        return frozenset(ids)

    @property
    def prefix(self) -> Prefix:
        """The shared prefix, prefilled on first use."""
        if self._prefix is None:
            with self.lock:
                self._prefix = self._prefix or self._prefill_prefix(len(self.prefix_ids))
        return self._prefix

    @property
    def prefix_key(self) -> str:
        """Key of the prefilled prefix in storage: a digest of everything that determines its bytes."""
        return self.fingerprint(method="prefix").digest

    def load_prefix(self, path: Path) -> None:
        """Load the prefilled prefix from a file with `prefix.to_bytes(key=prefix_key)`.

        Raises:
            CorruptCacheError: The file has other contents.
        """
        shape = (self.num_layers, self.num_kv_heads, len(self.prefix_ids), self.head_dim)
        like = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._prefix = Prefix.load(path, key=self.prefix_key, regime=self.rope.regime(shape[2]), like=like)

    def prefix_for(self, n_positions: int) -> Prefix:
        """The prefix with the rotary frequencies of a sequence of `n_positions` in total."""
        if self.prefix.regime == self.rope.regime(n_positions):
            return self.prefix
        return self._prefill_prefix(n_positions)

    def _prefill_prefix(self, n_positions: int) -> Prefix:
        n_prefix = len(self.prefix_ids)
        cache = self.empty_cache(n_prefix + 1)
        own, wanted = self.rope.regime(n_prefix), self.rope.regime(n_positions)
        if self.prefix_ids and own == wanted:
            self.prefill(torch.tensor([self.prefix_ids]), cache)
        elif self.prefix_ids:
            # Rotary modules choose their frequencies by the last position of the input. An extra token at that position
            # is invisible to the prefix, and selects the frequencies of a sequence of that length.
            ids = torch.tensor([[*self.prefix_ids, self.prefix_ids[-1]]])
            positions = torch.arange(n_prefix + 1, device=self.device)
            positions[-1] = n_positions - 1
            self._forward(self.decoder, ids, cache, lengths=None, context=None, positions=positions[None])
            cache.rewind(1)
        layers = [cache.layer(index) for index in range(self.num_layers)]
        keys, values = torch.stack([k[0] for k, _ in layers]), torch.stack([v[0] for _, v in layers])
        return Prefix(keys, values, wanted)

    def empty_cache(self, capacity: int, *, batch_size: int = 1) -> PositionedCache:
        """An empty cache with room for `capacity` entries."""
        self.check_process()
        shape = (self.num_layers, batch_size, self.num_kv_heads, capacity, self.head_dim)
        keys = torch.empty(shape, dtype=self.dtype, device=self.device)
        none = torch.empty(0, dtype=torch.int32, device=self.device)
        return PositionedCache(keys, torch.empty_like(keys), positions=none, next_position=0)

    def prefixed_cache(self, n_tokens: int, *, room: int = 0, batch_size: int = 1) -> PositionedCache:
        """A cache with the shared prefix, and room for a document of `n_tokens` and `room` more entries."""
        n_prefix = len(self.prefix_ids)
        prefix = self.prefix_for(n_prefix + n_tokens)
        cache = self.empty_cache(n_prefix + n_tokens + room, batch_size=batch_size)
        for index, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(keys.expand(batch_size, -1, -1, -1), values.expand(batch_size, -1, -1, -1), index)
        cache.composed_positions = torch.arange(n_prefix, dtype=torch.int32, device=self.device)
        cache.next_positions += n_prefix
        cache.n_positions = n_prefix + n_tokens
        return cache

    def check_positions(self, n_positions: int, *, what: str) -> None:
        """Raise `ContextWindowError` unless the model can address `n_positions`."""
        self.check_process()
        if n_positions > self.context_window:
            raise ContextWindowError(
                f"{what} needs {n_positions:,} positions, the model has {self.context_window:,}",
                where=self.name,
                next_step="Retrieve fewer or shorter documents, lower max_new_tokens, or use layout='packed'.",
            )
