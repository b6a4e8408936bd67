"""The command line: `kv-memory`. One module per command; nothing here loads a model library before a command runs."""

from __future__ import annotations

from kv_memory.cli.app import app, main

__all__ = ["app", "main"]
