"""What a built cache holds, and what cannot be built."""

import copy
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from cache_builds import (
    ARGUMENTS,
    LAYER,
    MIN_POSITION,
    NUM_SEQUENCES,
    VOCAB,
    WIDTH,
    assert_verified,
    files_of,
    make_corpus,
    make_subject,
    make_tokenizer,
    shard_hashes,
)
from datasets import Dataset
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.data import cache_plan
from consistency_lens.data.activation_reading import length_buckets
from consistency_lens.data.cache_building import build_activation_cache, build_activation_caches
from consistency_lens.data.cache_plan import draw_positions
from consistency_lens.data.corpus import corpus_from_rows
from consistency_lens.fingerprints import weights_hash
from consistency_lens.residual_stream import ResidualStream
from consistency_lens.subject import Subject


@pytest.fixture(scope="module")
def subject():
    return make_subject()


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


@pytest.fixture
def build(subject, corpus, tmp_path):
    def build(path="cache", **changes):
        arguments = {"subject": subject, "corpus": corpus, "tokenizer": make_tokenizer(), **ARGUMENTS} | changes
        return build_activation_cache(path=tmp_path / path, **arguments)

    return build


@pytest.fixture
def build_layers(subject, corpus, tmp_path):
    def build_layers(layers, path="layers", **changes):
        arguments = {"stream": subject.stream, "tokenizer": make_tokenizer(), **ARGUMENTS} | changes
        paths = {layer: tmp_path / path / str(layer) for layer in layers}
        return build_activation_caches(corpus=arguments.pop("corpus", corpus), paths=paths, **arguments)

    return build_layers


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


def test_positions_are_uniform():
    drawn = [draw_positions(12, 5, index, 2, 4, seed=0) for index in range(3000)]
    shares = np.bincount(np.concatenate(drawn), minlength=11)[4:] / 6000
    np.testing.assert_allclose(shares, 1 / 7, atol=0.02)


def test_a_sequence_with_few_positions_gives_all_of_them():
    assert draw_positions(8, 5, 0, 10, 4, seed=0).tolist() == [4, 5, 6]


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


# Batches


def test_buckets_hold_every_sequence_once_in_batches_of_no_more_tokens_than_the_first():
    lengths = np.random.default_rng(0).integers(5, 100, 200).tolist()
    buckets = length_buckets(lengths, 8)
    assert sorted(np.concatenate(buckets)) == list(range(200))
    assert len(buckets[0]) == 8
    padded = [len(bucket) * max(lengths[i] for i in bucket) for bucket in buckets]
    assert max(padded) <= 8 * max(lengths)
    assert sum(padded) < 1.1 * sum(lengths)


def test_batches_that_do_not_fit_the_device_are_named(build, monkeypatch):
    subject = make_subject()

    def full(*_arguments, **_keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(subject.model, "forward", full)
    with pytest.raises(ValueError, match="no room for 6 sequences of .* lower batch_size from 32"):
        build(subject=subject)


def test_memory_does_not_grow_with_the_rows(build):
    def peak(num_sequences):
        corpus = make_corpus(num_sequences)
        tracemalloc.start()
        try:
            build(f"{num_sequences}", corpus=corpus, rows_per_shard=192)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(64)  # what is imported and kept once
    assert peak(1920) < 1.5 * peak(192)


# Prints the peak of memory, in KiB, of building caches of N and of 8 N rows, each in a process of its own.
PEAKS = """
import multiprocessing, sys
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
from cache_builds import ARGUMENTS, make_tokenizer
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.data.corpus import CORPUS_FEATURES
from consistency_lens.subject import Subject

config = LlamaConfig(
    vocab_size=30, hidden_size=1024, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
SUBJECT = Subject(LlamaForCausalLM(config), 0)

def build(sequences, folder, result):
    tokens = np.random.default_rng(0).integers(0, 30, (sequences, 16)).tolist()
    rows = {"input_ids": tokens, "document": list(range(sequences))}
    Dataset.from_dict(rows, features=CORPUS_FEATURES).save_to_disk(folder / "corpus")
    del tokens, rows
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    corpus = Dataset.load_from_disk(folder / "corpus")
    arguments = ARGUMENTS | {"positions_per_sequence": 8, "rows_per_shard": 512}
    build_activation_cache(SUBJECT, corpus, folder / "cache", tokenizer=make_tokenizer(), **arguments)
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    result.put(int(status["VmHWM"].split()[0]))

fork = multiprocessing.get_context("fork")
for sequences in (512, 4096):
    result = fork.Queue()
    process = fork.Process(target=build, args=(sequences, Path(sys.argv[1]) / str(sequences), result))
    process.start()
    print(result.get(timeout=300))
    process.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from /proc")
def test_the_peak_of_memory_does_not_grow_with_the_rows(tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    finished = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    few, many = (int(line) * 1024 for line in finished.stdout.splitlines()[-2:])
    more_activations = (4096 - 512) * 8 * 1024 * 4  # bytes, were they all held
    assert many - few < more_activations / 3


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


# Bad input


def test_activations_that_are_not_finite_are_refused(build):
    subject = make_subject()
    subject.model.model.layers[LAYER].mlp.down_proj.weight.data[0, 0] = float("nan")
    message = r"18 of 18 activations of layer 1 are not finite \(the first at position \d+ of document \d+\); check"
    with pytest.raises(ValueError, match=message):
        build(subject=subject)


def test_a_subject_that_overflows_float16_is_refused_and_float32_is_the_way_out(build):
    subject = make_subject()
    subject.model.model.layers[LAYER].mlp.down_proj.weight.data *= 1e9
    with pytest.raises(ValueError, match=r"not finite .*float16 overflows.*load it in float32 \(--dtype float32\)"):
        build(subject=Subject(copy.deepcopy(subject.model).half(), LAYER))
    build("wide", subject=subject)


def test_float16_overflow_is_refused_and_float32_is_the_way_out(build):
    subject = make_subject()
    subject.model.model.embed_tokens.weight.data *= 1e8
    with pytest.raises(ValueError, match=r"overflows float16 .* pass dtype='float32' \(--cache_dtype float32\)"):
        build(subject=subject, dtype="float16")
    build("wide", subject=subject)


def test_text_that_is_too_short_throughout_is_refused(build):
    with pytest.raises(ValueError, match="longest of 26 sequences has 20 tokens, too short for min_position=19"):
        build(min_position=19)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions_per_sequence": 0}, "positions_per_sequence must be at least 1, got 0"),
        ({"rows_per_shard": 0}, "rows_per_shard must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"min_position": -1}, "min_position must be 0 or more, got -1"),
        ({"dtype": "int8"}, "dtype must be 'float16' or 'float32', got 'int8'"),
        ({"max_norm": 1.5}, "max_norm is a multiple of the median norm and must be at least 2, got 1.5"),
        ({"rows_per_shard": 2**28}, "rows_per_shard=268435456 contexts of up to 20 tokens are too many"),
        ({"corpus": Dataset.from_dict({"text": ["a"]})}, r"lacks \['input_ids', 'document'\]"),
        ({"corpus": corpus_from_rows([])}, "the corpus is empty"),
        ({"corpus": corpus_from_rows([{"input_ids": [VOCAB] * 9, "document": 1}])}, "token ids from 30 to 30"),
        ({"tokenizer": make_tokenizer(VOCAB + 1)}, "tokenizer has 31 tokens, but the subject only 30"),
    ],
)
def test_bad_arguments_are_named_and_leave_no_folder(build, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)
    assert not (tmp_path / "cache").exists()


def test_sequences_beyond_the_context_of_the_subject_are_refused(tmp_path):
    corpus = corpus_from_rows([{"input_ids": [5] * 129, "document": 1}])
    with pytest.raises(ValueError, match="has 129 tokens, beyond the subject's context of 128; tokenise with max_len"):
        build_activation_cache(
            Subject(tiny_model("gpt2"), 1), corpus, tmp_path / "cache", tokenizer=tiny_tokenizer(), **ARGUMENTS
        )


def test_a_layer_that_is_not_there_is_refused(build_layers, tmp_path):
    with pytest.raises(ValueError, match="layer must lie in 0..2"):
        build_layers([1, 3])
    assert not (tmp_path / "layers").exists()


def test_an_unknown_argument_is_refused(build):
    with pytest.raises(TypeError, match="positions_per_sequnce"):
        build(positions_per_sequnce=3)


def test_the_plan_counts_the_rows_of_each_shard(corpus):
    plan = cache_plan.plan_cache(
        corpus, positions_per_sequence=3, min_position=MIN_POSITION, rows_per_shard=18, seed=0, vocab_size=VOCAB,
        max_length=None,
    )  # fmt: skip
    assert plan.shard_rows.tolist() == [plan.shard(index).num_rows for index in range(len(plan.shard_rows))]
    assert plan.sample(5).num_rows == 15 and len(plan.sample(1000).contexts) == NUM_SEQUENCES


def test_a_stream_with_named_blocks_serves(tmp_path, corpus, subject):
    stream = ResidualStream(subject.model, blocks="model.layers")
    path = tmp_path / "named"
    build_activation_caches(stream, corpus, {0: path}, tokenizer=make_tokenizer(), **ARGUMENTS)
    assert (path / "provenance.json").is_file()
