"""The command line `kv-memory`: one module per group of commands. Model libraries load only when a command runs."""

from __future__ import annotations

from kv_memory.cli.app import app, main

__all__ = ["app", "main"]
