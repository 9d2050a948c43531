"""Text to `batch(step)`: sources, tokenizers, the token cache, packing and order."""
