"""What a built cache holds."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from cache_builds import (
    ARGUMENTS,
    LAYER,
    MIN_POSITION,
    NUM_SEQUENCES,
    WIDTH,
    assert_verified,
    build,
    build_layers,
    corpus,
    files_of,
    make_subject,
    make_tokenizer,
    shard_hashes,
    subject,
)
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.data.activation_reading import length_buckets
from consistency_lens.data.cache_building import build_activation_cache, build_activation_caches
from consistency_lens.data.corpus import corpus_from_rows
from consistency_lens.fingerprints import weights_hash
from consistency_lens.residual_stream import ResidualStream
from consistency_lens.subject import Subject

__all__ = ["build", "build_layers", "corpus", "subject"]


def hidden_state(model, row, layer):
    """The activation of a row of a cache, by a whole pass over its context alone."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
    return output.hidden_states[layer + 1][0, row["position"]]


# What is cached


def test_activation_is_the_hidden_state_after_the_block(build, subject):
    for row in build().dataset:
        expected = hidden_state(subject.model, row, LAYER)
        torch.testing.assert_close(torch.tensor(row["activation"]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "gemma3", "gpt_neo"])
def test_batches_of_unlike_length_do_not_change_what_a_row_is(tmp_path, family):
    model = tiny_model(family)
    generator = np.random.default_rng(0)
    rows = [{"input_ids": generator.integers(3, 97, size), "document": size} for size in (6, 40, 7, 90, 23, 8)]
    cache = build_activation_cache(
        Subject(model, 1), corpus_from_rows(rows), tmp_path, tokenizer=tiny_tokenizer(),
        **ARGUMENTS | {"positions_per_sequence": 2},
    )  # fmt: skip
    for row in cache.dataset:
        expected = hidden_state(model, row, 1)
        torch.testing.assert_close(torch.tensor(row["activation"]), expected, atol=1e-4, rtol=1e-4)


def test_rows_hold_the_context_up_to_the_position_in_corpus_order(build, corpus):
    cache = build()
    kept = [row for row in corpus if len(row["input_ids"]) >= MIN_POSITION + 2]
    assert len(cache) == sum(min(3, len(row["input_ids"]) - 1 - MIN_POSITION) for row in kept) == 3 * NUM_SEQUENCES
    for index, row in enumerate(cache.dataset):
        sequence = kept[index // 3]
        assert row["document"] == sequence["document"]
        assert row["input_ids"] == sequence["input_ids"][: row["position"] + 1]


def test_positions_are_distinct_and_leave_a_next_token(build, corpus):
    lengths = [len(ids) for ids in corpus["input_ids"] if len(ids) >= MIN_POSITION + 2]
    positions = np.array(build().dataset["position"]).reshape(-1, 3)
    assert (positions >= MIN_POSITION).all()
    assert (positions <= np.array(lengths)[:, None] - 2).all()
    assert (np.diff(positions, axis=1) > 0).all()


def test_rows_do_not_depend_on_the_batch_size(build):
    one, many = build("one", batch_size=1), build("many", batch_size=7)
    for name in ("input_ids", "position", "document"):
        assert one.dataset[name][:] == many.dataset[name][:]
    np.testing.assert_allclose(one.activations(np.arange(len(one))), many.activations(np.arange(len(many))), atol=1e-5)


def test_another_seed_draws_other_positions(build):
    assert build("a", seed=0).dataset["position"][:] != build("b", seed=1).dataset["position"][:]


def test_float16_is_stored_as_float16(build):
    cache = build(dtype="float16")
    assert cache.activations(np.arange(4)).dtype == np.float16
    assert cache.dataset.features["activation"].length == WIDTH


def test_provenance_says_how_the_cache_was_made(build, subject):
    facts = {"max_length": 20, "packing": False}
    revisions = {"subject_revision": "abc", "dataset_revision": "def"}
    cache = build(**revisions, dataset_split="train", seed=3, corpus_facts=facts)
    activations = cache.activations(np.arange(len(cache))).astype(np.float64)
    expected = {
        "subject": "tiny",
        "subject_revision": "abc",
        "weights_hash": weights_hash(subject.model),
        "dataset": "random",
        "dataset_revision": "def",
        "dataset_split": "train",
        "corpus": facts,
        "layer": LAYER,
        "width": WIDTH,
        "dtype": "float32",
        "seed": 3,
        "max_norm": None,
        "rows": len(cache),
        "sequences": {"kept": NUM_SEQUENCES, "skipped_too_short": 2},
        "loaded_as": {"dtype": "float32", "attention": "sdpa", "quantization": None},
    }
    assert {name: cache.provenance[name] for name in expected} == expected
    assert {"tokenizer", "tokenizer_hash", "dataset_hash"} <= cache.provenance.keys()
    assert "norm_filter" not in cache.provenance
    assert cache.provenance["positions"]["min_position"] == MIN_POSITION
    assert sum(shard["rows"] for shard in cache.provenance["shards"]) == len(cache)
    assert {"torch", "transformers", "datasets"} <= cache.provenance["versions"].keys()
    np.testing.assert_allclose(cache.mean, activations.mean(axis=0), rtol=1e-5)
    assert cache.rms == pytest.approx(np.sqrt(((activations - activations.mean(axis=0)) ** 2).mean()))


def test_a_finished_folder_holds_shards_and_provenance_alone(build):
    cache = build()
    shards = {shard["file"] for shard in cache.provenance["shards"]}
    assert files_of(cache.path).keys() == shards | {"provenance.json"}


# Several layers


def test_several_layers_in_one_pass_equal_a_build_of_each(build, build_layers):
    caches = build_layers([2, 0])
    for layer in (0, 2):
        assert files_of(caches[layer].path) == files_of(build(f"single-{layer}", subject=make_subject(layer)).path)


def test_a_layer_more_leaves_the_finished_ones_alone(build_layers):
    first = files_of(build_layers([1])[1].path)
    caches = build_layers([0, 1, 2])
    assert files_of(caches[1].path) == first
    assert shard_hashes(caches[0]) != shard_hashes(caches[2])


def test_each_shard_runs_once_for_all_layers_and_no_further_than_the_highest(build_layers, subject, monkeypatch):
    ran = []

    def forbidden(*_arguments, **_keywords):
        raise AssertionError("a block above the highest layer, the norm or the head ran")

    for module in (subject.model.model.layers[2], subject.model.model.norm, subject.model.lm_head):
        monkeypatch.setattr(module, "forward", forbidden)
    first, forward = subject.model.model.layers[0], subject.model.model.layers[0].forward
    monkeypatch.setattr(first, "forward", lambda *args, **kwargs: ran.append(args) or forward(*args, **kwargs))
    caches = build_layers([0, 1], rows_per_shard=1000)
    assert len(ran) == len(length_buckets(batch_lengths(caches[0]), 32))


def batch_lengths(cache):
    """Tokens of each sequence that the subject read: as far as its last position."""
    return [position + 1 for position in cache.dataset["position"][2::3]]


# How it is built


def test_the_bar_shows_rows_and_tokens_a_second_and_the_time_that_is_left(build, capsys):
    build(progress=True, dataset_split="train")
    shown = capsys.readouterr().err
    assert "caching activations of train:" in shown
    assert "72/72" in shown and "rows/s" in shown and "tokens/s" in shown
    assert "00:00<00:00" in shown


def test_an_offloaded_subject_gives_the_same_cache(build):
    expected = build("whole")
    subject = make_subject()
    cpu_offload(subject.model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in subject.model.parameters())
    assert files_of(build("offloaded", subject=subject).path) == files_of(expected.path)


def test_a_stream_with_named_blocks_serves(tmp_path, corpus, subject):
    stream = ResidualStream(subject.model, blocks="model.layers")
    path = tmp_path / "named"
    build_activation_caches(stream, corpus, {0: path}, tokenizer=make_tokenizer(), **ARGUMENTS)
    assert (path / "provenance.json").is_file()


# Massive activations

MASSIVE = [7, 8, 9]


@pytest.fixture(scope="module")
def outlier_subject():
    """A subject in which three tokens have activations that are larger than the others by orders of magnitude."""
    subject = make_subject()
    subject.model.model.embed_tokens.weight.data[MASSIVE] *= 1e5
    return subject


def test_rows_of_massive_norm_are_dropped_and_counted(build, outlier_subject):
    whole, filtered = build("whole", subject=outlier_subject), build("cut", subject=outlier_subject, max_norm=10)
    norms = np.linalg.norm(whole.activations(np.arange(len(whole))).astype(np.float64), axis=1)
    massive = np.array([row["input_ids"][-1] in MASSIVE for row in whole.dataset])
    assert 0 < massive.sum() < len(massive) / 2
    assert norms[massive].min() > 100 * norms[~massive].max()
    np.testing.assert_array_equal(
        filtered.activations(np.arange(len(filtered))), whole.activations(np.flatnonzero(~massive))
    )
    kept = [row for row, dropped in zip(whole.dataset, massive, strict=True) if not dropped]
    assert list(filtered.dataset) == kept
    found = filtered.provenance["norm_filter"]
    assert found["dropped_rows"] == massive.sum()
    assert found["median_norm"] == pytest.approx(np.median(norms), rel=1e-3)
    assert found["largest_norm"] == pytest.approx(10 * found["median_norm"])
    assert filtered.provenance["rows"] == len(filtered) == len(kept)


def test_each_layer_has_its_own_norms(build_layers, outlier_subject):
    caches = build_layers([0, 1], stream=outlier_subject.stream, max_norm=10)
    found = [caches[layer].provenance["norm_filter"] for layer in (0, 1)]
    assert found[0]["median_norm"] != found[1]["median_norm"]


def test_a_shard_may_lose_all_its_rows(build, outlier_subject, corpus):
    massive = [{"input_ids": [7] * 9, "document": n} for n in range(3)]
    usual = [{"input_ids": list(range(10, 22)), "document": n + 10} for n in range(30)]
    cache = build(subject=outlier_subject, corpus=corpus_from_rows(massive + usual), max_norm=10, rows_per_shard=9)
    assert cache.provenance["shards"][0]["rows"] == 0
    assert cache.provenance["norm_filter"]["dropped_rows"] == 9
    assert len(cache) == 90
    assert_verified(cache.path)
    assert cache.mean.isfinite().all()
