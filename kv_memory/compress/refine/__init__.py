"""Refinement: the entries of one cache moved by gradient steps, against probes made from its document."""
