"""Builds of caches that are killed, of a subject for which the norm filter has something to drop."""

import pytest
from cache_builds import ARGUMENTS, files_of, make_corpus, make_subject, make_tokenizer

from consistency_lens.data.cache_building import build_activation_caches

LAYERS = (0, 2)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def uneven_subject():
    """A subject in which three tokens have massive activations, so that the norm filter has something to drop."""
    subject = make_subject()
    subject.model.model.embed_tokens.weight.data[7:10] *= 1e4
    return subject


@pytest.fixture(scope="module")
def subject():
    return uneven_subject()


def build_both(folder, subject, **changes):
    """Two layers, with a norm filter: all that a build can do."""
    arguments = {"corpus": make_corpus(), "tokenizer": make_tokenizer(), **ARGUMENTS, "max_norm": 4.0} | changes
    return build_activation_caches(subject.stream, paths={k: folder / str(k) for k in LAYERS}, **arguments)


def both_files(folder):
    return {layer: files_of(folder / str(layer)) for layer in LAYERS}
