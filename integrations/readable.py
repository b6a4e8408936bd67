"""Cleans chat turns of characters that no document may contain."""

from __future__ import annotations

from kv_memory import Turn

__all__ = ["readable"]


def readable(turn: Turn) -> Turn:
    """A turn with NUL replaced by U+FFFD and lone surrogates by `?`.

    A turn that cannot be compressed would otherwise block its chat permanently.
    """
    return Turn(turn.role, turn.text.replace("\0", "\ufffd").encode(errors="replace").decode())
