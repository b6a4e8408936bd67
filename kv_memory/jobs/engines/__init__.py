"""Who runs the workers: processes of this machine, or Ray."""
