"""Rollout: text out of a model, with a key-value cache, batched or streamed."""
