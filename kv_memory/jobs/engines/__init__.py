"""Engines that run the workers: as processes of this machine, or on Ray."""
