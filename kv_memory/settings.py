"""Settings that a store records: how its documents are compressed and asked."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kv_memory.cache.keep import Keep
from kv_memory.config import (
    LANGUAGES,
    Layout,
    PassageOrder,
    RetrieverName,
    SelectorName,
    StorageName,
    check_choices,
    check_fields,
    check_names,
    check_rank_bias,
    ratio_of,
    size_of,
)
from kv_memory.errors import ConfigError
from kv_memory.model.embedded import BUILT_IN, DEFAULTS, EMBEDDED, SHIPPED, built_in, concrete_name, recorded_settings
from kv_memory.model.prompts import PromptName

NO_ADAPTER = NO_ENCODER = "none"  # the name a caller passes for "no adapter" and "no encoder"
KEEP_NAMES = ("keep_ratio", "keep_tokens", "max_bytes")  # settings of which one replaces the others
# Among several passages, these lose more answers than the second and third passage add: docs/fidelity.md.
_ONE_PASSAGE = {"smollm2", "qwen-0.5b"}
_REFINE_STEPS = 48  # if only min_fidelity is given
# A model of 135M parameters loses the thread in long passages. int8 costs it less than half a point of F1 at 1/4, 1/8
# and 1/16: docs/fidelity.md.
OF_SMOLLM2: dict[str, Any] = {"adapter": SHIPPED, "passage_tokens": 256, "storage": "int8"}


def _passage_tokens(text: str) -> int | Literal["auto"] | None:
    if text in {"auto", "whole"}:
        return "auto" if text == "auto" else None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"passage_tokens must be a number, 'whole' or 'auto', got {text!r}",
            where="passage_tokens",
            next_step="Pass for example 512.",
        ) from None


# Settings with a written form, and its parser.
WRITTEN: dict[str, Callable[[str], Any]] = {
    "keep_ratio": ratio_of,
    "max_bytes": functools.partial(size_of, where="max_bytes"),
    "passage_tokens": _passage_tokens,
}


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """How a store's documents are compressed and asked; recorded in the store.

    The defaults are those of a new store. `smollm2` has its own for adapter, passage_tokens and storage: see `resolve`.

    The command line shows these lines as the help of its options.

    Attributes:
        model: Name of a built-in model (`qwen-0.5b`, `smollm2`), a model folder, or a Hugging Face hub id. A new store
            takes `qwen-0.5b`, or `smollm2` if only that one is prepared, and records its choice.
        adapter: Folder of a trained adapter of that model, `shipped` for the one inside this package, or none.
        keep_ratio: Share of the tokens kept, in (0, 1], e.g. 0.125 or `1/8`. 0.25 unless keep_tokens or max_bytes is
            set.
        keep_tokens: Number of tokens kept of each passage in every layer and head, instead of a share. It is an average
            where heads share their entries. Shorter passages are kept whole.
        max_bytes: Largest size of a passage's cache file in bytes, or e.g. `300KB` or `2MB`, instead of a share. A
            cache that fits is kept whole.
        selector: Selector without an adapter: `matched` (closest), `reconstruction` (half the time), `attention`
            (fastest) or `sink_recent`; or `combined`, an adapter and `matched` together, which comes closer than the
            adapter alone, in twice the time.
        passage_tokens: Length of the longest passage in tokens, or `whole` (None) if documents are not split.
        prompt: Name of the prompt form: `auto`, `chat`, `brief` or `passage`.
        chat_options: Variables of the model's chat template, e.g. `enable_thinking=true,reasoning_effort=high` or, in
            Python, a dict. Those that make a model think before it answers are off unless named here.
        layout: Placement of documents, see `generate.compose`.
        order: Order of the passages found for a question. `best_last` puts the best one next to the question.
        rank_bias: Bias of the passages behind the best one, at most 0: at -1, their attention has 0.37 times its
            weight. 0 treats all alike.
        refine_steps: Number of gradient steps that refine the cache of every passage, see `RefineSettings`: 8 or 48, or
            144 if little is kept; 0 for none. It comes closer to the full cache, for about 70, 270 or many hundred
            prefills.
        min_fidelity: KL to the full cache on held-out probes, in nats, at which refinement stops. It gives up after 192
            steps, or after refine_steps if that is more. None stops after refine_steps.
        storage: Storage type of keys and values that are added: `auto` (as the model computes them), `float32`,
            `bfloat16`, `float16` or `int8`, which takes half the bytes of bfloat16. Stored caches keep their type.
        keep_text: True to keep the texts of added documents. Texts are needed to show them with an answer, to replace a
            damaged cache, for `read_from="text"` (ask --text), and to `refresh` documents that are not files. Without
            them a store holds caches, the documents' ids and metadata, and hashes of words; see
            `kv_memory.retrieval.tokenize` for what the hashes protect. Unchanged documents that are added again gain or
            lose their text without being compressed again.
        language: Language of added documents, whose stems and stop words questions are matched by: `auto` detects it,
            `none` matches words as they are written, or an ISO 639 code, e.g. `de`.
        retriever: Way of finding passages: `bm25` (by words), `embedding` (by the vectors of an encoder), or `hybrid`
            (by both together).
        encoder: Name of the encoder whose vectors are stored with added documents: `minilm` is built in, others are
            objects passed to `KVMemory.open`; `none` stores no vectors.
    """

    model: str = DEFAULTS[0]
    adapter: str | None = None
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    max_bytes: int | None = None
    selector: SelectorName = "matched"
    passage_tokens: int | None = 1024
    prompt: PromptName = "auto"
    chat_options: str = ""
    layout: Layout = "source"
    order: PassageOrder = "best_last"
    rank_bias: float = -1.0
    refine_steps: int = 0
    min_fidelity: float | None = None
    storage: StorageName = "auto"
    keep_text: bool = False
    language: str = "auto"
    retriever: RetrieverName = "bm25"
    encoder: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", concrete_name(self.model))
        if self.keep_ratio is self.keep_tokens is self.max_bytes is None:
            object.__setattr__(self, "keep_ratio", 0.25)
        if self.encoder is None and self.retriever != "bm25":
            object.__setattr__(self, "encoder", "minilm")
        _ = self.keep, self.switches  # they raise for values that are out of range or malformed
        check_choices(self)
        check_rank_bias(self.rank_bias)
        check_fields(
            self,
            model=(isinstance(self.model, str) and bool(self.model), "a name, a folder or a hub id"),
            adapter=(self.adapter is None or isinstance(self.adapter, str), "a folder or None"),
            passage_tokens=(self.passage_tokens is None or _is_int(self.passage_tokens, 16), "at least 16 or None"),
            refine_steps=(_is_int(self.refine_steps, 0), "a whole number, 0 or more"),
            min_fidelity=(
                self.min_fidelity is None
                or (isinstance(self.min_fidelity, int | float) and 0 < self.min_fidelity < math.inf),
                "a KL in nats above 0, e.g. 0.1, or None",
            ),
            keep_text=(isinstance(self.keep_text, bool), "True or False"),
            encoder=(self.encoder is None or (isinstance(self.encoder, str) and bool(self.encoder)), "a name or None"),
            language=(self.language in {"auto", "none", *LANGUAGES}, f"auto, none or one of {', '.join(LANGUAGES)}"),
        )

    @functools.cached_property
    def keep(self) -> Keep:
        """The keep_ratio, token budget or size limit of each passage."""
        kept = {name: getattr(self, name) for name in KEEP_NAMES}
        return Keep(**kept, storage=self.storage)

    @functools.cached_property
    def switches(self) -> dict[str, Any]:
        """The variables in `chat_options`; values are JSON, or else texts."""
        found: dict[str, Any] = {}
        for pair in filter(None, self.chat_options.split(",")):
            name, equals, value = pair.partition("=")
            if not equals or not name.strip().isidentifier():
                raise ConfigError(
                    f"not a variable of a chat template: {pair!r}",
                    where="chat_options",
                    next_step="Write NAME=VALUE, several with commas between them, e.g. enable_thinking=true.",
                )
            try:
                found[name.strip()] = json.loads(value)
            except ValueError:
                found[name.strip()] = value.strip()
        return found

    @property
    def top_k(self) -> int:
        """Default number of passages to answer from: 1 for `smollm2` and `qwen-0.5b`, otherwise 3."""
        return 1 if (found := built_in(self.model)) is not None and found.name in _ONE_PASSAGE else 3

    @classmethod
    def resolve(cls, recorded: Mapping[str, Any], **changes: Any) -> MemorySettings:
        """The changes, else what is recorded, else the defaults.

        A change to None leaves the setting as it is, except passage_tokens=None, which keeps documents whole
        (`auto` leaves it). The adapter name `none` means no adapter, and so does a training-free selector without an
        adapter. One of keep_ratio, keep_tokens and max_bytes replaces the recorded one. Written forms are accepted:
        `1/8` as keep_ratio, `300KB` as max_bytes, `whole` as passage_tokens.

        Args:
            recorded: Settings recorded by the last `add`; empty for a new store. Earlier versions, which knew one
                built-in model only, recorded it as `embedded` or not at all.
            changes: Fields to change.

        Raises:
            ConfigError: A name is unknown, a value is out of range, or two changes contradict each other.
        """
        given = _given(changes)
        kept = {k: value for k, value in recorded_settings(recorded).items() if k in cls.__dataclass_fields__}
        if recorded:
            kept.setdefault("model", "smollm2")
            kept.setdefault("keep_text", True)  # older versions kept all texts, so their stores continue to
        # 1. The model. Keep a recorded one: another default on this machine must not cause all documents to be
        #    compressed again.
        model = given.get("model", kept.get("model", EMBEDDED))
        if model == EMBEDDED:
            model = kept["model"] if kept.get("model") in DEFAULTS else concrete_name(EMBEDDED)
        # 2. Drop recorded values that the changes make void.
        if model != kept.get("model"):
            # Adapter, prompt and chat template belong to a model, and the cost of int8 was measured on one model only.
            for name in ("adapter", "prompt", "chat_options", "storage"):
                kept.pop(name, None)
        if "refine_steps" in given:
            kept.pop("min_fidelity", None)  # newly given steps are exact, not a start towards the old fidelity
        if given.get("selector") == "combined" and kept.get("adapter") is None:
            kept.pop("adapter", None)  # the recorded None only meant a training-free selector
        # 3. Merge. The defaults of the fields fill what is left.
        values = {**kept, **given, "model": model}
        if values.get("min_fidelity") is not None and not values.get("refine_steps"):
            values["refine_steps"] = _REFINE_STEPS
        if built_in(model) is BUILT_IN["smollm2"]:
            values = {**OF_SMOLLM2, **values}
        if values.get("adapter") is None and values.get("selector") == "combined" and "selector" not in given:
            del values["selector"]  # recorded when there was an adapter
        return cls(**values)


def _given(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes that were made, in the form of the fields."""
    check_names(changes, MemorySettings.__dataclass_fields__, what="setting")
    given: dict[str, Any] = {}
    for name, value in changes.items():
        if isinstance(value, str) and name in WRITTEN:
            value = WRITTEN[name](value)
        if name == "chat_options" and isinstance(value, Mapping):
            value = ",".join(f"{key}={json.dumps(each)}" for key, each in value.items())
        if value != "auto" if name == "passage_tokens" else value is not None:
            given[name] = str(value) if isinstance(value, Path) else value
    if given.keys() & set(KEEP_NAMES):
        given = {**dict.fromkeys(KEEP_NAMES), **given}
    adapter, selector = given.get("adapter"), given.get("selector")
    if selector == "combined" and adapter == NO_ADAPTER:
        raise ConfigError(
            "selector 'combined' needs an adapter, and adapter='none' means no adapter",
            where="selector",
            next_step="Drop one, or use selector 'matched'.",
        )
    if given.get("refine_steps") == 0 and "min_fidelity" in given:
        raise ConfigError(
            "min_fidelity needs refinement, and refine_steps=0 turns it off",
            where="min_fidelity",
            next_step="Drop one.",
        )
    if given.get("encoder") == NO_ENCODER:
        if given.get("retriever", "bm25") != "bm25":
            raise ConfigError(
                f"retriever {given['retriever']!r} needs an encoder, and encoder='none' means no encoder",
                where="encoder",
                next_step="Drop one, or use retriever 'bm25'.",
            )
        given |= {"encoder": None, "retriever": "bm25"}
    # Naming a training-free selector means no adapter; `combined` is the exception: it needs one.
    if adapter == NO_ADAPTER or (adapter is None and selector not in {None, "combined"}):
        given["adapter"] = None
    return given


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
