"""Distilled caches: their format in memory and on disk, their fingerprint, and the number of entries to keep."""
