"""The language model: loading, prompt form, attention, rotary positions and KV cache."""
