from pathlib import Path

import numpy as np
import pytest
import torch
from cache_builds import ARGUMENTS, NUM_SEQUENCES, VOCAB, make_corpus, make_subject, make_tokenizer
from datasets import Dataset
from torch.utils.data import DataLoader

from consistency_lens.data.activation_cache import ActivationCache, cache_path
from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.data.collator import ActivationCollator
from consistency_lens.data.corpus import corpus_from_rows, is_validation_document
from consistency_lens.fingerprints import weights_hash


@pytest.fixture(scope="module")
def subject():
    return make_subject()


@pytest.fixture
def build(subject, tmp_path):
    def build(path="cache", corpus=None, **changes):
        corpus = make_corpus() if corpus is None else corpus
        arguments = {**ARGUMENTS, **changes}
        return build_activation_cache(subject, corpus, tmp_path / path, tokenizer=make_tokenizer(), **arguments)

    return build


def make_cache(documents):
    columns = {
        "activation": np.arange(len(documents), dtype=np.float32)[:, None].repeat(2, axis=1),
        "input_ids": [[1, 2]] * len(documents),
        "position": [1] * len(documents),
        "document": documents,
    }
    return ActivationCache(Dataset.from_dict(columns), {}, Path("nowhere"))


# Opening


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


def test_a_truncated_shard_is_not_opened(build):
    cache = build()
    shard = cache.path / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="shard-00001.arrow.* bytes instead of"):
        ActivationCache.open(cache.path)
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00001.arrow.* is missing"):
        ActivationCache.open(cache.path)


def test_a_damaged_shard_is_told(build):
    cache = build()
    shard = cache.path / "shard-00001.arrow"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match="activation cache: a shard in .* is damaged .*; find it with"):
        ActivationCache.open(cache.path)


@pytest.mark.parametrize(("content", "message"), [('{"layer": 1', "is damaged "), ("{}", "is of something else")])
def test_a_provenance_that_is_none_is_told(build, content, message):
    cache = build()
    (cache.path / "provenance.json").write_text(content)
    with pytest.raises(ValueError, match=f"activation cache: .*provenance.json' {message}"):
        ActivationCache.open(cache.path)


def test_the_path_names_dataset_model_layer_and_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpora" / "stories").mkdir(parents=True)
    path = cache_path("root", "corpora/stories", "org/model", 7, "train")
    assert path == Path("root/stories/org--model/layer_7/train")
    assert cache_path("root", "org/data", "..", 0, "validation").parts[1:3] == ("org--data", tmp_path.parent.name)


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
    with pytest.raises(ValueError, match="0 of [0-9]+ held-out rows have contexts of their own"):
        build("same", corpus=corpus_from_rows(rows), positions_per_sequence=8).split_unseen(0.3)
