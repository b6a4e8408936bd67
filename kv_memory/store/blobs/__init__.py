"""Tensor bytes on the local disk or in an object store, read only after their hash was checked."""
