"""kv-memory under other frameworks: one subpackage each, thin, without tensor code.

This folder is installed as `kv_memory.integrations`, never as a top-level `integrations`. Modules here import
each other with relative imports, which hold under both names.
"""

from __future__ import annotations

__all__: list[str] = []
