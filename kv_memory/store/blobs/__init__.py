"""Tensor bytes: on the local disk or in an object store, and read only if their hash is right."""
