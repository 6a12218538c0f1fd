"""The plain way of the formulas that have a fast one: torch's own operations, one behind the other, under autograd.

It holds all rows at once and walks through them more often; it is there to compare with, and to fall back on.
"""

from collections.abc import Iterator
from contextlib import contextmanager

# Not a context variable: what a checkpoint runs again runs in a thread of autograd's, which has a context of its own.
_depth = 0


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Inside the `with` block, of all threads, the losses over the vocabulary, the straight-through embedding and the
    products with its tables go the plain way, as does the backward pass of what has run in it."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_plain() -> bool:
    """Whether the plain way is to be gone."""
    return _depth > 0
