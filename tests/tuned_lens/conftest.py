"""Fixtures that several test files of the tuned lens share."""

from publishing import lens, local, on_hub
from token_texts import arguments, model, read, tokenizer
from tuned_trainers import make

__all__ = ["arguments", "lens", "local", "make", "model", "on_hub", "read", "tokenizer"]
