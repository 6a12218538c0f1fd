"""A tiny subject, its activations and a lens, for the tests of training; made the same way in every process."""

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from published_rows import published
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from consistency_lens import ConsistencyLensModel, Subject
from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.data.collator import ActivationCollator
from consistency_lens.data.corpus import corpus_from_rows, document_hash
from consistency_lens.data.on_the_fly import ContextRows, OnTheFlyActivations
from consistency_lens.training.arguments import ConsistencyLensTrainingArguments
from consistency_lens.training.trainer import ConsistencyLensTrainer

LAYER, NUM_TEXT_TOKENS = 1, 3


def tiny_corpus(num_documents: int = 24) -> Dataset:
    random = np.random.default_rng(0)
    documents = [[1, *random.integers(3, 97, random.integers(10, 16)).tolist(), 2] for _ in range(num_documents)]
    return corpus_from_rows({"input_ids": ids, "document": document_hash(ids)} for ids in documents)


def tiny_cache(
    folder: Path, num_documents: int = 24, model: PreTrainedModel | None = None
) -> tuple[Subject, PreTrainedTokenizerFast, ActivationCache]:
    tokenizer, subject = tiny_tokenizer(), Subject(model or tiny_model("llama"), LAYER)
    if model is not None:
        return subject, tokenizer, build_tiny_cache(folder, num_documents, subject, tokenizer)
    if not (folder / "provenance.json").exists():
        shutil.copytree(cache_of_tiny_model(num_documents).name, folder, dirs_exist_ok=True)
    return subject, tokenizer, ActivationCache.open(folder)


@functools.cache
def cache_of_tiny_model(num_documents: int) -> tempfile.TemporaryDirectory:
    """A folder with the cache of most tests, which a process builds once; it goes when the process ends."""
    folder = tempfile.TemporaryDirectory()
    build_tiny_cache(Path(folder.name), num_documents, Subject(tiny_model("llama"), LAYER), tiny_tokenizer())
    return folder


def build_tiny_cache(
    folder: Path, num_documents: int, subject: Subject, tokenizer: PreTrainedTokenizerFast
) -> ActivationCache:
    return build_activation_cache(
        subject, tiny_corpus(num_documents), folder, tokenizer=tokenizer, subject_name="tiny", dataset_name="random",
        dtype="float32", positions_per_sequence=3, min_position=4, progress=False,
    )  # fmt: skip


def training_rows(source: str, subject: Subject, cache: ActivationCache, pair_seed: int | None) -> Any:
    """The rows of a cache as each of the three sources gives them."""
    if source == "stream":
        return published(cache).stream(pair_seed=pair_seed)
    if source == "on_the_fly":
        settings = {"positions_per_sequence": 3, "min_position": 4, "seed": 0}
        return ContextRows(OnTheFlyActivations.from_corpus(subject, tiny_corpus(), {}, **settings), pair_seed)
    return ActivationRows(cache, pair_seed)


def tiny_lens(subject: Subject, tokenizer: PreTrainedTokenizerFast, cache: ActivationCache, **settings):
    torch.manual_seed(0)
    settings = {"training": "full", "num_text_tokens": NUM_TEXT_TOKENS} | settings
    lens = ConsistencyLensModel.from_subject(subject.model, tokenizer, LAYER, **settings)
    lens.set_statistics(cache.mean, cache.rms)
    return lens


def tiny_trainer(
    folder: Path,
    lens_settings: dict | None = None,
    source: str = "cache",
    model: PreTrainedModel | None = None,
    **arguments,
) -> ConsistencyLensTrainer:
    subject, tokenizer, cache = tiny_cache(folder / "cache", model=model)
    defaults = {
        "output_dir": str(folder / "run"), "use_cpu": True, "max_steps": 6, "per_device_train_batch_size": 8,
        "learning_rate": 1e-3, "stages": ["warm_start 50%", "gumbel"], "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "mse_weight": "1", "per_device_eval_batch_size": 24,
    }  # fmt: skip
    args = ConsistencyLensTrainingArguments(**(defaults | arguments))
    pair_seed = 0 if args.needs_others() else None
    own_seed = None if args.pair_in_batch and source != "stream" else pair_seed
    return ConsistencyLensTrainer(
        model=tiny_lens(subject, tokenizer, cache, **(lens_settings or {})),
        args=args,
        train_dataset=training_rows(source, subject, cache, own_seed),
        eval_dataset=ActivationRows(cache, pair_seed),
        data_collator=ActivationCollator(0, NUM_TEXT_TOKENS, bos_token_id=1),
    )
