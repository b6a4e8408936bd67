"""Turns without what no document may hold."""

from __future__ import annotations

from kv_memory import Turn

__all__ = ["readable"]


def readable(turn: Turn) -> Turn:
    """A turn with U+FFFD for NUL and half surrogate pairs: one that cannot be distilled would block a chat for ever."""
    return Turn(turn.role, turn.text.replace("\0", "\ufffd").encode(errors="replace").decode())
