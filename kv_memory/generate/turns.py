"""Encodes the turns of a conversation as token ids, after documents or on their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from kv_memory.config import check_choice
from kv_memory.errors import ConfigError
from kv_memory.model.backbone import Backbone
from kv_memory.model.prompts import render_chat

Role = Literal["system", "user", "assistant"]


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: Role
    text: str


class Prompt(NamedTuple):
    """Tokens to prefill for a reply.

    Attributes:
        ids: Token ids.
        behind_prefix: True if they follow the shared prefix (and documents); False if they are the whole prompt.
    """

    ids: list[int]
    behind_prefix: bool


class _Piece(NamedTuple):
    text: str
    is_foreign: bool  # from outside: special tokens in it stay text


def encode_turns(backbone: Backbone, turns: Sequence[Turn]) -> Prompt:
    """Turns in the wrappers of the backbone's prompt form, to follow the shared prefix and documents.

    Instructions (system turns) are put ahead of the user turn that follows them, because everything before the
    documents must be the same for all conversations. Instructions that the prefix contains already are left out.

    Raises:
        ConfigError: There is no turn, one has an unknown role, or the last one is the assistant's.
    """
    form = backbone.prompt
    in_prefix = {"", form.system_prompt.strip()}
    pieces: list[_Piece] = []
    for turn in _alternate([t for t in turns if not (t.role == "system" and t.text.strip() in in_prefix)]):
        if turn.role == "user":
            around = form.question_before, form.question_after
        else:
            around = form.answer_before, form.answer_after
        pieces += [_Piece(around[0], False), _Piece(turn.text, True), _Piece(around[1], False)]
    return Prompt(_encode(backbone, pieces), behind_prefix=True)


def encode_chat(backbone: Backbone, turns: Sequence[Turn]) -> Prompt:
    """Turns without documents, in the model's own chat template, or in the prompt form if it has none.

    Raises:
        ConfigError: As in `encode_turns`.
    """
    if not getattr(backbone.tokenizer, "chat_template", None):
        return encode_turns(backbone, turns)
    system = "\n\n".join(turn.text.strip() for turn in turns if turn.role == "system")
    others = [turn for turn in turns if turn.role != "system"]
    if system and others:
        alternating = _alternate(others)
        try:
            return _templated(backbone, [Turn("system", system), *alternating])
        except ConfigError:  # a template without system turns (Gemma)
            pass
    return _templated(backbone, _alternate(turns))


def encode_text_prompt(backbone: Backbone, text: str) -> Prompt:
    """A prompt that the caller has put together, including special tokens.

    If it begins with the shared prefix, the rest follows the cached prefix, which is not prefilled again.

    Raises:
        ConfigError: The prompt is empty.
    """
    prefix = backbone.prompt.prefix
    if prefix and text.startswith(prefix) and text != prefix:
        return Prompt(backbone.encode(text[len(prefix) :]), behind_prefix=True)
    ids = backbone.encode(text)
    start = backbone.tokenizer.bos_token_id
    wants_start = backbone.prompt.add_bos and start is not None and backbone.prefix_ids[:1] == (start,)
    if wants_start and ids[:1] != [start]:
        ids = [start, *ids]
    if not ids:
        raise ConfigError("an empty prompt", where="prompt", next_step="Pass the text to continue.")
    return Prompt(ids, behind_prefix=False)


def _alternate(turns: Sequence[Turn]) -> list[Turn]:
    """Alternating user and assistant turns, the user first and last; instructions join the user turn that follows."""
    merged: list[Turn] = []
    for turn in turns:
        check_choice(turn.role, Role, where="role")
        role: Role = "assistant" if turn.role == "assistant" else "user"
        if merged and merged[-1].role == role:
            merged[-1] = Turn(role, f"{merged[-1].text}\n\n{turn.text.strip()}")
        else:
            merged.append(Turn(role, turn.text.strip()))
    if not merged or merged[-1].role == "assistant":
        raise ConfigError(
            "a conversation must end with a user turn" if merged else "there is no turn to reply to",
            where="turns",
            next_step="Append the question as the last turn.",
        )
    return merged if merged[0].role == "user" else [Turn("user", ""), *merged]


def _templated(backbone: Backbone, turns: Sequence[Turn]) -> Prompt:
    marks = [f"\ue000{index}\ue001" for index in range(len(turns))]
    messages = [{"role": turn.role, "content": mark} for turn, mark in zip(turns, marks, strict=True)]
    text = render_chat(backbone.tokenizer, messages, dict(backbone.prompt.switches))
    pieces: list[_Piece] = []
    for turn, mark in zip(turns, marks, strict=True):
        before, found, text = text.partition(mark)
        if not found:
            raise ConfigError(
                f"the chat template drops the {turn.role}'s turn", where="prompt", next_step='Use prompt="passage".'
            )
        pieces += [_Piece(before, False), _Piece(turn.text.strip(), True)]
    return Prompt(_encode(backbone, [*pieces, _Piece(text, False)]), behind_prefix=False)


def _encode(backbone: Backbone, pieces: Sequence[_Piece]) -> list[int]:
    if not any(piece.is_foreign and backbone.spells_special(piece.text) for piece in pieces):
        return backbone.encode("".join(piece.text for piece in pieces))  # in one piece, as in the model's training
    ids: list[int] = []
    for piece in pieces:
        ids += backbone.encode_text(piece.text) if piece.is_foreign else backbone.encode(piece.text)
    return ids
