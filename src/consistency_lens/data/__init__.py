"""Data: corpora of tokens, activation caches made from them, and batches for training."""
