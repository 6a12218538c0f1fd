import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from consistency_lens import atomic_write
from consistency_lens.data import cache_building
from consistency_lens.data.activation_cache import ActivationCache, ActivationRows, streaming_moments
from consistency_lens.data.cache_building import build_activation_cache, draw_positions, weights_hash
from consistency_lens.data.collator import ActivationCollator
from consistency_lens.data.corpus import corpus_from_rows, is_validation_document
from consistency_lens.subject import Subject

VOCAB, WIDTH, LAYER, NUM_SEQUENCES, MIN_POSITION = 30, 16, 1, 24, 4


def make_subject(layer=LAYER):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return Subject(LlamaForCausalLM(config), layer)


@pytest.fixture(scope="module")
def subject():
    return make_subject()


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {f"w{n}": n for n in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab)), eos_token="w0")


@pytest.fixture(scope="module")
def corpus():
    """24 sequences of 8 to 20 tokens, two of each document, and two that are too short."""
    generator = np.random.default_rng(0)
    documents = generator.integers(0, 2**63, NUM_SEQUENCES // 2)
    rows = [
        {"input_ids": generator.integers(0, VOCAB, generator.integers(8, 21)), "document": documents[n // 2]}
        for n in range(NUM_SEQUENCES)
    ]
    rows[5:5] = [{"input_ids": [1] * 3, "document": 7}, {"input_ids": [1] * (MIN_POSITION + 1), "document": 8}]
    return corpus_from_rows(rows)


@pytest.fixture
def build(subject, corpus, tokenizer, tmp_path):
    def build(path="cache", **changes):
        arguments = {
            "subject": subject,
            "corpus": corpus,
            "path": tmp_path / path,
            "tokenizer": tokenizer,
            "subject_name": "tiny",
            "dataset_name": "random",
            "positions_per_sequence": 3,
            "min_position": MIN_POSITION,
            "dtype": "float32",
            "rows_per_shard": 18,
            "progress": False,
        }
        return build_activation_cache(**arguments | changes)

    return build


def make_cache(documents):
    columns = {
        "activation": np.arange(len(documents), dtype=np.float32)[:, None].repeat(2, axis=1),
        "input_ids": [[1, 2]] * len(documents),
        "position": [1] * len(documents),
        "document": documents,
    }
    return ActivationCache(Dataset.from_dict(columns), {}, Path("nowhere"))


def shard_hashes(cache):
    return [shard["sha256"] for shard in cache.provenance["shards"]]


# What is cached


def test_activation_is_the_hidden_state_after_the_block(build, subject):
    cache = build()
    for row in cache.dataset:
        with torch.no_grad():
            output = subject.model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
        expected = output.hidden_states[LAYER + 1][0, row["position"]]
        torch.testing.assert_close(torch.tensor(row["activation"]), expected, atol=1e-5, rtol=1e-5)


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
    cache = build(subject_revision="abc", dataset_revision="def", seed=3)
    activations = cache.activations(np.arange(len(cache))).astype(np.float64)
    expected = {
        "subject": "tiny",
        "subject_revision": "abc",
        "weights_hash": weights_hash(subject.model),
        "dataset": "random",
        "dataset_revision": "def",
        "layer": LAYER,
        "width": WIDTH,
        "dtype": "float32",
        "seed": 3,
        "rows": len(cache),
        "sequences": {"kept": NUM_SEQUENCES, "skipped_too_short": 2},
    }
    assert {name: cache.provenance[name] for name in expected} == expected
    assert {"tokenizer", "tokenizer_hash", "dataset_hash"} <= cache.provenance.keys()
    assert cache.provenance["positions"]["min_position"] == MIN_POSITION
    assert sum(shard["rows"] for shard in cache.provenance["shards"]) == len(cache)
    assert {"torch", "transformers", "datasets"} <= cache.provenance["versions"].keys()
    np.testing.assert_allclose(cache.mean, activations.mean(axis=0), rtol=1e-5)
    assert cache.rms == pytest.approx(np.sqrt(((activations - activations.mean(axis=0)) ** 2).mean()))


def test_moments_survive_a_mean_far_larger_than_the_spread():
    activations = np.random.default_rng(0).normal(size=(1000, 5)) + 1e6
    moments = streaming_moments(np.split(activations, [1, 300, 900]))
    np.testing.assert_allclose(moments.mean, activations.mean(axis=0), rtol=1e-12)
    assert moments.rms == pytest.approx((activations - activations.mean(axis=0)).std(), rel=1e-6)


def test_weights_hash_sees_a_changed_weight(subject):
    model = copy.deepcopy(subject.model)
    assert weights_hash(model) == weights_hash(subject.model)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1e-3
    assert weights_hash(model) != weights_hash(subject.model)


# Killed, resumed, reopened


def test_a_killed_build_goes_on_and_ends_with_the_same_rows(build, monkeypatch, tmp_path):
    whole = build("whole")
    write_shard, written = cache_building._write_shard, []

    def write_two_then_die(file, *arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file)
        write_shard(file, *arguments)

    monkeypatch.setattr(cache_building, "_write_shard", write_two_then_die)
    with pytest.raises(KeyboardInterrupt):
        build("killed")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="an unfinished cache"):
        ActivationCache.open(tmp_path / "killed")
    before = [file.stat().st_mtime_ns for file in written]
    resumed = build("killed")
    assert [file.stat().st_mtime_ns for file in written] == before
    assert len(shard_hashes(whole)) > 3
    assert shard_hashes(resumed) == shard_hashes(whole)
    np.testing.assert_array_equal(resumed.mean, whole.mean)


def test_a_shard_cut_short_while_written_is_written_again(build, monkeypatch, tmp_path):
    whole = build("whole")
    monkeypatch.setattr(atomic_write.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        build("killed")
    monkeypatch.undo()
    assert shard_hashes(build("killed")) == shard_hashes(whole)
    assert not list((tmp_path / "killed").glob(".*.partial"))


def test_a_finished_cache_is_opened_and_not_built_again(build, monkeypatch, subject):
    first = build()
    monkeypatch.setattr(subject, "activations", None)
    assert shard_hashes(build()) == shard_hashes(first)


@pytest.mark.parametrize(("name", "value"), [("seed", 5), ("dtype", "float16"), ("min_position", 6)])
def test_other_settings_in_the_same_folder_are_refused(build, name, value):
    build()
    with pytest.raises(ValueError, match=f"was built with .*{value}"):
        build(**{name: value})


def test_shards_of_unknown_origin_are_refused(build, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "shard-00000.arrow").touch()
    with pytest.raises(ValueError, match="has shards but no building.json"):
        build()


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"subject_name": "other"}, "subject 'tiny', but the lens has 'other'"),
        ({"weights_hash": "0000"}, "weights_hash '[0-9a-f]{64}', but the lens has '0000'"),
        ({"layer": 2}, "layer 1, but the lens has 2"),
        ({"width": 64}, "width 16, but the lens has 64"),
    ],
)
def test_a_cache_of_another_subject_layer_or_width_is_refused(build, expected, message):
    with pytest.raises(ValueError, match=message):
        ActivationCache.open(build().path, **expected)


def test_a_matching_cache_opens(build, subject):
    path = build().path
    ActivationCache.open(path, subject_name="tiny", weights_hash=weights_hash(subject.model), layer=1, width=16)


def test_a_folder_without_a_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no cache at"):
        ActivationCache.open(tmp_path)


def test_a_flipped_byte_is_found(build):
    cache = build()
    cache.verify()
    shard = cache.path / "shard-00002.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="shard-00002.arrow.*sha256"):
        ActivationCache.open(cache.path).verify()


def test_a_truncated_shard_is_not_opened(build):
    cache = build()
    shard = cache.path / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="shard-00001.arrow.*bytes instead of"):
        ActivationCache.open(cache.path)


# Bad input


def test_activations_that_are_not_finite_are_refused(build):
    subject = make_subject()
    subject.model.model.layers[LAYER].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"18 of 18 activations of layer 1 are not finite"):
        build(subject=subject)


def test_float16_overflow_is_refused_and_float32_is_the_way_out(build):
    subject = make_subject()
    subject.model.model.embed_tokens.weight.data *= 1e8
    with pytest.raises(ValueError, match="overflows float16 .* pass dtype='float32'"):
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
        ({"min_position": -1}, "min_position must be 0 or more, got -1"),
        ({"dtype": "int8"}, "dtype must be 'float16' or 'float32', got 'int8'"),
        ({"corpus": Dataset.from_dict({"text": ["a"]})}, r"lacks \['input_ids', 'document'\]"),
        ({"corpus": corpus_from_rows([])}, "the corpus is empty"),
        ({"corpus": corpus_from_rows([{"input_ids": [VOCAB] * 9, "document": 1}])}, "token ids from 30 to 30"),
    ],
)
def test_bad_arguments_are_named_and_leave_no_folder(build, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(build):
    vocab = {f"w{n}": n for n in range(VOCAB + 1)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab)))
    with pytest.raises(ValueError, match="tokenizer has 31 tokens, but the subject only 30"):
        build(tokenizer=tokenizer)


# Split and pairing


def test_split_keeps_each_document_on_one_side(build):
    train, validation = build().split(0.4)
    assert len(train) + len(validation) == 3 * NUM_SEQUENCES
    assert set(train.documents).isdisjoint(validation.documents)
    assert all(is_validation_document(int(document), 0.4) for document in validation.documents)
    assert sorted([*train.rows, *validation.rows]) == list(range(3 * NUM_SEQUENCES))


def test_both_sides_of_a_split_use_the_moments_of_the_training_rows(build):
    cache = build()
    train, validation = cache.split(0.4)
    activations = train.activations(np.arange(len(train))).astype(np.float64)
    mean = activations.mean(axis=0)
    for part in (train, validation):
        np.testing.assert_allclose(part.mean, mean, rtol=1e-5)
        assert part.rms == pytest.approx(np.sqrt(((activations - mean) ** 2).mean()))
    assert abs(train.mean - cache.mean).max() > 1e-4


@pytest.mark.parametrize(("fraction", "message"), [(1.5, "between 0 and 1, got 1.5"), (1e-9, "one side is empty")])
def test_a_split_with_an_empty_side_is_refused(build, fraction, message):
    with pytest.raises(ValueError, match=message):
        build().split(fraction)


@pytest.mark.parametrize("sizes", [[1, 1], [1] * 9, [3, 3, 3], [5, 1, 1, 2, 1], [4, 3, 2], [2, 2, 1]])
@pytest.mark.parametrize("seed", range(5))
def test_pairing_is_a_permutation_that_leaves_every_document(sizes, seed):
    documents = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    partners = make_cache(documents).pair(seed)
    assert sorted(partners) == list(range(len(documents)))
    assert (documents[partners] != documents).all()


@pytest.mark.parametrize("sizes", [[2, 1], [9, 1, 1]])
def test_pairing_repeats_partners_where_one_document_holds_most_rows(sizes):
    documents = np.repeat(np.arange(len(sizes)), sizes)
    partners = make_cache(documents).pair(0)
    assert (documents[partners] != documents).all()


def test_pairing_is_seeded():
    cache = make_cache(np.arange(50))
    np.testing.assert_array_equal(cache.pair(3), cache.pair(3))
    assert (cache.pair(3) != cache.pair(4)).any()


def test_pairing_within_one_document_is_refused():
    with pytest.raises(ValueError, match="all 4 rows are of one"):
        make_cache([7] * 4).pair(0)


# Rows for the trainer


def test_rows_carry_their_index_in_the_whole_cache_and_their_partner(build):
    cache = build()
    _, validation = cache.split(0.4)
    rows = ActivationRows(validation, pair_seed=0)
    for index in (0, len(rows) - 1):
        row = rows[index]
        stored = cache.dataset[int(row["row"])]
        assert row["row"] == validation.rows[index]
        assert row["input_ids"].tolist() == stored["input_ids"]
        assert (row["position"], row["document"]) == (stored["position"], stored["document"])
        np.testing.assert_array_equal(row["activation"], np.float32(stored["activation"]))
        other = validation.dataset[int(rows.partners[index])]
        np.testing.assert_array_equal(row["other_activation"], np.float32(other["activation"]))
        assert other["document"] != row["document"]


def test_a_data_loader_batches_rows(build):
    cache = build()
    loader = DataLoader(ActivationRows(cache), batch_size=5, collate_fn=ActivationCollator(0, 4))
    batches = list(loader)
    assert torch.cat([batch["rows"] for batch in batches]).tolist() == list(range(len(cache)))
    activations = torch.cat([batch["activations"] for batch in batches])
    np.testing.assert_array_equal(activations, cache.activations(np.arange(len(cache))))
    assert "other_activations" not in batches[0]


def test_provenance_is_written_last(build, monkeypatch, tmp_path):
    monkeypatch.setattr(cache_building, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build()
    assert json.loads((tmp_path / "cache" / "building.json").read_text())["layer"] == LAYER
    assert not (tmp_path / "cache" / "provenance.json").exists()


def test_held_out_rows_with_a_training_context_are_left_out(build):
    """Some documents begin alike: a held-out context that a training context begins with is no news."""
    generator = np.random.default_rng(1)
    documents = generator.integers(0, 2**63, 40)
    opening = generator.integers(0, VOCAB, 9).tolist()
    rows = [
        {"input_ids": [*opening, *generator.integers(0, VOCAB, 8).tolist()], "document": document}
        for document in documents
    ]
    cache = build("alike", corpus=corpus_from_rows(rows), positions_per_sequence=6)
    train, held_out = cache.split(0.3)
    same, unseen = cache.split_unseen(0.3)
    assert np.array_equal(same.rows, train.rows) and torch.equal(unseen.mean, train.mean)
    seen = {tuple(row["input_ids"][:n]) for row in ActivationRows(train) for n in range(1, len(row["input_ids"]) + 1)}
    expected = [int(row["row"]) for row in ActivationRows(held_out) if tuple(row["input_ids"]) not in seen]
    assert unseen.rows.tolist() == expected
    assert 0 < len(unseen) < len(held_out)


def test_nothing_new_to_hold_out_is_an_error(build):
    generator = np.random.default_rng(1)
    text = generator.integers(0, VOCAB, 16).tolist()
    rows = [{"input_ids": text, "document": document} for document in generator.integers(0, 2**63, 40)]
    with pytest.raises(ValueError, match="leaves 0 held-out rows with contexts of their own"):
        build("same", corpus=corpus_from_rows(rows), positions_per_sequence=8).split_unseen(0.3)
