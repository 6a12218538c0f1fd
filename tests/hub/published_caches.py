"""Tiny caches to publish: train and validation of one layer, and the subject that they were read from."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.cache_building import build_activation_caches
from consistency_lens.data.corpus import split_by_document, tokenize_documents
from consistency_lens.hub.cache_push import push_cache
from consistency_lens.residual_stream import ResidualStream

LAYER = 1
REPO = "user/tiny-activations"


class BuiltCaches(NamedTuple):
    """Where things lie."""

    layer: Path
    """The folder with `train` and `validation`."""
    subject: Path
    """The subject's folder."""


TEXTS = [" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(10 + i % 9)) for i in range(40)]


def build_caches(root: Path, texts=TEXTS, **arguments) -> BuiltCaches:
    """Caches of `root/subject` at `LAYER`, float16, several shards in train; `arguments` change the build."""
    subject, tokenizer = root / "subject", tiny_tokenizer()
    model = tiny_model("llama")
    model.save_pretrained(subject)
    tokenizer.save_pretrained(subject)
    splits = split_by_document(tokenize_documents(texts, tokenizer), 0.2)
    layer = root / f"layer_{LAYER}"
    tokenizer.name_or_path = str(subject)
    for split, corpus in zip(("train", "validation"), splits, strict=True):
        settings = {
            "subject_name": str(subject), "dataset_name": str(root / "texts.txt"), "dataset_split": split,
            "positions_per_sequence": 3, "min_position": 4, "rows_per_shard": 40, "progress": False,
        } | arguments  # fmt: skip
        build_activation_caches(ResidualStream(model), corpus, {LAYER: layer / split}, tokenizer=tokenizer, **settings)
    return BuiltCaches(layer, subject)


def rows_of(path: Path) -> pa.Table:
    """All rows of a cache, in order."""
    return ActivationCache.open(path).dataset.data.table.combine_chunks()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_caches(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def layer(built, tmp_path):
    """A copy of the caches that a test may change."""
    return shutil.copytree(built.layer, tmp_path / "layer_1")


def push(path, **arguments):
    return push_cache(path, REPO, progress=False, **arguments)


def files_of(hub):
    return hub.dataset(REPO).head.files
