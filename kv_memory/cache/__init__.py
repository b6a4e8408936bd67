"""Distilled caches: their form in memory and on disk, who made them, and how many entries they keep."""
