"""The language model: loading it, its prompt form, its attention, rotary positions and KV cache."""
