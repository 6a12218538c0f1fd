"""The plain way of the formulas that have a fast one: torch's own operations, one behind the other, under autograd.

It holds all rows at once and walks through them more often; it is there to compare with, and to fall back on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plain_arithmetic(plain: bool = True) -> Iterator[None]:
    """Inside the `with` block, the losses over the vocabulary, the straight-through embedding, the products with its
    tables, adapters (as PEFT runs them) and frozen weights under autocast go the plain way, or with `plain=False` the
    fast one. What has run in it is differentiated likewise."""
    token = _plain.set(plain)
    try:
        yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    """Whether the plain way is to be gone."""
    return _plain.get()
