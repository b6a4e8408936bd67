"""Training an adapter: data, objective, warm-up and distillation."""
