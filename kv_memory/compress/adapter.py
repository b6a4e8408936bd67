"""Adapter: a routed LoRA of one model, and what decides where it acts: a scorer, or restore tokens.

An adapter folder is an ordinary PEFT folder with two more files: `kv_distill.json`, and `scorer.safetensors` or
`restore.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kv_memory.compress.restore import RestoreTokens, check_restore_tokens
from kv_memory.compress.routing import RoutedLinear, install_routing
from kv_memory.compress.scorer import Scorer, ScorerKind
from kv_memory.config import Budget, check_choice, check_keep_ratio
from kv_memory.errors import AdapterError, ConfigError
from kv_memory.model.backbone import Backbone
from kv_memory.model.embedded import built_in, recorded_name

ADAPTER_VERSIONS = (3, 4)  # of the format; 4 has restore tokens
Routed = Literal["kept", "document"]
Target = Literal["q", "k", "v", "o"]
_FILES = ("adapter_config.json", "adapter_model.safetensors", "kv_distill.json")
_HEADS = ("scorer.safetensors", "restore.safetensors")


def default_eta(num_layers: int) -> int:
    """Default layer for the scorer's input: 6 as in the paper, a quarter of the layers in models with fewer than 24."""
    return 6 if num_layers >= 24 else max(1, num_layers // 4)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Contents of `kv_distill.json`.

    Attributes:
        version: Version of the adapter format, see `ADAPTER_VERSIONS`.
        base_model: Name of the model the adapter was made for, for people; `base_weights` is what is compared.
        base_weights: Hash of that model's weights.
        architecture: Model type of that model.
        num_layers: Number of layers of that model.
        num_kv_heads: Number of KV heads of that model.
        hidden_size: Hidden size of that model.
        eta: Number of the layer, from 1, with the output that the scorer sees; unused by scorers of the kind `layer`.
        scorer: Kind of scorer, see `ScorerKind`.
        scorer_size: Width of the scorer's hidden layer.
        routed: Tokens that go through the LoRA. `kept`: only those kept by some head of a layer, as in the paper.
            `document`: all tokens of the document.
        budget: Distribution of entries among the heads, see `Budget`.
        first_routed_layer: Index of the first layer with routing; layers below it stay frozen. From eta upwards one
            pass is enough for scorers that look at layer eta.
        full_strength_ratio: Keep ratio up to which the LoRA acts in full, see `strength`; 1 for always, as in the
            paper.
        trained_steps: Number of optimiser steps; 0 for an untrained adapter.
        restore_tokens: Number of restore tokens; 0 for an adapter with a scorer. With restore tokens, which alone go
            through the LoRA, `matched` selects; eta, scorer, routed, budget and the like have no meaning.
    """

    version: int = ADAPTER_VERSIONS[0]
    base_model: str
    base_weights: str
    architecture: str
    num_layers: int
    num_kv_heads: int
    hidden_size: int
    eta: int
    scorer: ScorerKind = "token"
    scorer_size: int = 256
    routed: Routed = "kept"
    budget: Budget = "head"
    first_routed_layer: int = 0
    full_strength_ratio: float = 1.0
    trained_steps: int = 0
    restore_tokens: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.eta <= self.num_layers:
            raise ConfigError(f"eta must be in the range 1 to {self.num_layers}, got {self.eta}", where="eta")
        if not 0 <= self.first_routed_layer < self.num_layers:
            raise ConfigError(
                f"first_routed_layer must be in the range 0 to {self.num_layers - 1}, got {self.first_routed_layer}",
                where="first_routed_layer",
            )
        check_keep_ratio(self.full_strength_ratio, where="full_strength_ratio")
        check_choice(self.scorer, ScorerKind, where="scorer")
        check_choice(self.routed, Routed, where="routed")
        check_choice(self.budget, Budget, where="budget")
        if self.budget == "model" and self.scorer == "layer" and self.routed == "kept":
            raise ConfigError(
                "with one budget for the whole model, the tokens a layer keeps are known only after all layers have "
                "scored, too late to route them",
                where="budget",
                next_step='Use routed="document", or scorer="head", or budget="head".',
            )

    @property
    def record(self) -> dict[str, Any]:
        """The fields as recorded in `kv_distill.json`: format 3 knows no restore tokens."""
        return {name: value for name, value in asdict(self).items() if name != "restore_tokens" or self.version > 3}

    def strength(self, keep_ratio: torch.Tensor) -> torch.Tensor:
        """Strength of the LoRA at a keep ratio: 1 up to `full_strength_ratio`, then falling with its logarithm.

        The more is kept, the less there is to pack into it, and the side effects of the LoRA then cost more than it
        gains: at 1/2 an adapter without this rule was seven times further from the full cache than its selection
        alone.

        Args:
            keep_ratio: Keep ratios in (0, 1], of any shape.

        Returns:
            Strengths from 0 to 1 in the same shape, float32; 0 where everything is kept, unless `full_strength_ratio`
            is 1.
        """
        if self.full_strength_ratio == 1:
            return torch.ones_like(keep_ratio, dtype=torch.float32)
        return (keep_ratio.float().log() / math.log(self.full_strength_ratio)).clamp(max=1)


class Adapter:
    """A scorer or restore tokens, and a routed LoRA, attached to a backbone.

    Attaching inserts LoRA layers into the backbone's model. They act on routed tokens only: without a routing mask the
    model's logits are bit-identical to those before. A model carries one adapter at a time.

    Args:
        backbone: Model the adapter is attached to.
        config: Configuration of the adapter.
        peft_model: PEFT wrapper around the backbone's model.
        head: Scorer or restore tokens, on the backbone's device, float32.
    """

    def __init__(
        self, backbone: Backbone, config: AdapterConfig, peft_model: PeftModel, head: Scorer | RestoreTokens
    ) -> None:
        self.backbone = backbone
        self.config = config
        self.peft_model = peft_model
        self.head = head
        self._handles = install_routing(backbone.layers)
        lora: Any = peft_model.peft_config["default"]
        if "qkv_proj" in lora.target_modules:
            for layer in backbone.layers:
                fused: Any = layer.self_attn.qkv_proj  # type: ignore[union-attr]
                fused.routed_features = backbone.num_heads * backbone.head_dim

    @classmethod
    def create(
        cls,
        backbone: Backbone,
        *,
        rank: int = 16,
        alpha: float | None = None,
        targets: Sequence[Target] = ("q", "o"),
        eta: int | None = None,
        scorer: ScorerKind = "token",
        scorer_size: int = 256,
        routed: Routed = "kept",
        budget: Budget = "head",
        first_routed_layer: int = 0,
        full_strength_ratio: float = 1.0,
        restore_tokens: int = 0,
        seed: int = 0,
        zero_init: bool = True,
    ) -> Adapter:
        """Create a new, untrained adapter for a model that has none yet.

        `rank`, `alpha` (twice the rank if None) and `targets` (projections; `q` and `o` in the paper) are those of the
        LoRA, which starts as no change at all; with `zero_init=False` it starts at random, for tests. `seed` decides
        the initial weights, and `eta` is `default_eta` if None. All others are as in `AdapterConfig`.
        """
        config = AdapterConfig(
            base_model=backbone.name,
            base_weights=backbone.weights_sha256,
            architecture=backbone.config.model_type,
            num_layers=backbone.num_layers,
            num_kv_heads=backbone.num_kv_heads,
            hidden_size=backbone.hidden_size,
            eta=eta if eta is not None else default_eta(backbone.num_layers),
            scorer=scorer,
            scorer_size=scorer_size,
            routed=routed,
            budget=budget,
            first_routed_layer=first_routed_layer,
            full_strength_ratio=full_strength_ratio,
            version=ADAPTER_VERSIONS[restore_tokens > 0],
            restore_tokens=restore_tokens,
        )
        check_restore_tokens(backbone, restore_tokens)
        lora_config = LoraConfig(
            r=rank,
            lora_alpha=alpha if alpha is not None else 2 * rank,  # type: ignore[arg-type]
            target_modules=_modules(backbone, targets),
            init_lora_weights=zero_init,
            task_type="CAUSAL_LM",
        )
        _refuse_second(backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft_model = _wrap(backbone, lora_config, None)
            head = _head(config)
        if isinstance(head, RestoreTokens):
            head.start_from(backbone)
        return cls(backbone, config, peft_model, head.to(backbone.device))

    @classmethod
    def load(cls, folder: Path | str, backbone: Backbone) -> Adapter:
        """Load an adapter folder and attach it.

        Raises:
            AdapterError: The folder is incomplete or malformed, or the model already carries an adapter; the adapter
                was made for other weights than the backbone's.
        """
        folder = Path(folder)
        next_step = f"An adapter is a folder with {', '.join(_FILES)}, and {' or '.join(_HEADS)}."
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if not any((folder / name).is_file() for name in _HEADS):
            missing.append(" or ".join(_HEADS))
        if missing:  # PEFT would look for a pickled adapter_model.bin, or on the hub
            raise AdapterError(
                f"not an adapter folder: {', '.join(missing)} missing", where=str(folder), next_step=next_step
            )
        try:
            data = json.loads((folder / "kv_distill.json").read_text())
            version, names = data.get("version"), {f.name for f in fields(AdapterConfig)}
            if version not in ADAPTER_VERSIONS or set(data) != names - ({"restore_tokens"} if version == 3 else set()):
                raise AdapterError(
                    f"adapter has format version {version}, this package reads {ADAPTER_VERSIONS}",
                    where=str(folder / "kv_distill.json"),
                    next_step="Use the version of kv-memory that made it, or train it again.",
                )
            config = AdapterConfig(**data)
            tensors = load_file(folder / _HEADS[config.restore_tokens > 0])
        except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            raise AdapterError(f"unreadable adapter: {error}", where=str(folder), next_step=next_step) from error
        if config.base_weights != backbone.weights_sha256:
            base_model = recorded_name(config.base_model)
            raise AdapterError(
                f"the adapter was made for {base_model} (weights {config.base_weights[:12]}), "
                f"but the loaded model is {backbone.name} (weights {backbone.weights_sha256[:12]})",
                where=str(folder),
                next_step=f"Load {base_model}, or train an adapter for {backbone.name}.",
            )
        _refuse_second(backbone)
        head = _head(config)
        try:
            head.load_state_dict(tensors)
            peft_model = _wrap(backbone, LoraConfig.from_pretrained(str(folder)), folder)
        except (RuntimeError, ValueError, TypeError, KeyError, SafetensorError, UserWarning) as error:
            _strip(backbone)  # PEFT inserts its layers before it loads their weights
            raise AdapterError(f"unreadable adapter: {error}", where=str(folder), next_step=next_step) from error
        return cls(backbone, config, peft_model, head.to(backbone.device))

    def save(self, folder: Path | str) -> None:
        """Write the adapter as a folder, see the top of this module."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lora: Any = self.peft_model.peft_config["default"]
        name = recorded_name(self.config.base_model)  # PEFT would record the folder of the weights
        model = built_in(name)
        lora.base_model_name_or_path = model.base_id if model else name
        # In the model's dtype, to which `load` would convert it anyway; in training it is float32.
        state = {n: p.to(self.backbone.dtype) for n, p in self.peft_model.named_parameters() if "lora_" in n}
        # Without this option PEFT looks up the base model on the hub, to see if its vocabulary grew.
        self.peft_model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
        head = {name: tensor.cpu().contiguous() for name, tensor in self.head.state_dict().items()}
        save_file(head, folder / _HEADS[self.config.restore_tokens > 0])
        (folder / "kv_distill.json").write_text(json.dumps(self.config.record, indent=2, sort_keys=True) + "\n")

    @property
    def scorer(self) -> Scorer:
        """The scorer.

        Raises:
            AdapterError: The adapter has restore tokens instead.
        """
        if not isinstance(self.head, Scorer):
            raise AdapterError("the adapter has restore tokens instead of a scorer", where=self.config.base_model)
        return self.head

    @property
    def sha256(self) -> str:
        """Hash of everything that changes the adapter's effect; the same before saving and after loading."""
        digest = hashlib.sha256(json.dumps(self.config.record, sort_keys=True).encode())
        lora: Any = self.peft_model.peft_config["default"]
        digest.update(f"{lora.r}:{lora.lora_alpha}:{lora.use_rslora}".encode())
        state: dict[str, torch.Tensor] = {
            **get_peft_model_state_dict(self.peft_model, save_embedding_layers=False),
            **self.head.state_dict(),
        }
        for name, tensor in sorted(state.items()):
            digest.update(f"{name}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
        return digest.hexdigest()

    def detach(self) -> None:
        """Remove the LoRA layers from the model; the adapter is unusable afterwards."""
        for handle in self._handles:
            handle.remove()
        _strip(self.backbone)


def _head(config: AdapterConfig) -> Scorer | RestoreTokens:
    return RestoreTokens(config) if config.restore_tokens else Scorer(config)


def _modules(backbone: Backbone, targets: Sequence[Target]) -> list[str]:
    """Names of the projection modules to adapt."""
    for target in targets:
        check_choice(target, Target, where="targets")
    if not targets:
        raise ConfigError("an adapter needs at least one projection to adapt", where="targets")
    names = [f"{target}_proj" for target in dict.fromkeys(targets)]
    if backbone.config.model_type != "phi3":
        return names
    if {"k", "v"} & set(targets):
        raise ConfigError(
            "the keys and values of a fused projection (Phi-3) cannot be adapted",
            where="targets",
            next_step='Use targets=("q", "o").',
        )
    return ["qkv_proj" if name == "q_proj" else name for name in names]


def _refuse_second(backbone: Backbone) -> None:
    if hasattr(backbone.model, "peft_config"):
        raise AdapterError(
            "the model already has an adapter", where=backbone.name, next_step="Call `adapter.detach()` first."
        )


def _wrap(backbone: Backbone, config: LoraConfig, folder: Path | None) -> Any:
    config._register_custom_module({nn.Linear: RoutedLinear})
    # The LoRA gets the model's own dtype: float32 adapters on a bfloat16 model would make every projection cast its
    # input, even where no token is routed. A trainer that wants float32 adapters casts them itself.
    wrapped: Any
    with warnings.catch_warnings():
        # PEFT reads this attribute of the model; Transformers renamed it in 5.24.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("error", message="Found missing adapter keys")  # missing weights would stay random
        if folder is None:
            wrapped = get_peft_model(backbone.model, config, autocast_adapter_dtype=False)
        else:
            wrapped = PeftModel.from_pretrained(
                backbone.model, str(folder), config=config, autocast_adapter_dtype=False
            )
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(backbone.device, backbone.dtype)
    return wrapped.eval().requires_grad_(False)


def _strip(backbone: Backbone) -> None:
    """Put the frozen projections back in place of the LoRA layers around them.

    PEFT's own `unload` needs its wrapper, which does not exist after a failed load, and leaves its configuration on
    the model.
    """
    for layer in backbone.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, RoutedLinear):
                    setattr(parent, name, child.get_base_layer())
    if hasattr(backbone.model, "peft_config"):
        del backbone.model.peft_config
