"""kv-memory under other frameworks: one thin subpackage for each, without tensor code.

This folder is installed as `kv_memory.integrations`, never as a top-level `integrations`. Its modules use relative
imports among themselves, which work under both names.
"""

from __future__ import annotations

__all__: list[str] = []
