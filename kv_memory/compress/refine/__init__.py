"""Refinement: gradient steps on the entries of one cache, against probes made from its document."""
