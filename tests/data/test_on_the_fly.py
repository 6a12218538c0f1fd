import numpy as np
import pytest
import torch
from cache_builds import ARGUMENTS, LAYER, MIN_POSITION, make_corpus, make_subject, make_tokenizer
from torch.utils.data import DataLoader

from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.data.collator import ActivationCollator
from consistency_lens.data.corpus import corpus_from_rows
from consistency_lens.data.on_the_fly import ContextRows, OnTheFlyActivations, read_activations

SETTINGS = {"positions_per_sequence": 3, "min_position": MIN_POSITION, "seed": 0}


@pytest.fixture(scope="module")
def subject():
    return make_subject()


@pytest.fixture
def cache(subject, tmp_path):
    return build_activation_cache(
        subject, make_corpus(), tmp_path / "cache", tokenizer=make_tokenizer(), seed=0, **ARGUMENTS
    )


@pytest.fixture
def source(subject):
    return OnTheFlyActivations.from_corpus(subject, make_corpus(), {"subject": "tiny"}, **SETTINGS)


def assert_same_rows(rows, others):
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            np.testing.assert_allclose(row[name], other[name], rtol=1e-5, atol=1e-6)


def test_the_rows_are_those_of_a_cache(cache, source):
    order = np.random.default_rng(0).permutation(len(cache)).tolist()
    assert_same_rows(
        ActivationRows(source, pair_seed=1).__getitems__(order), ActivationRows(cache, pair_seed=1).__getitems__(order)
    )


def test_so_are_both_sides_of_a_split(cache, source):
    for part, other in zip(source.split_unseen(0.4), cache.split_unseen(0.4), strict=True):
        assert np.array_equal(part.rows, other.rows)
        assert np.array_equal(part.documents, other.documents)
        assert_same_rows(ActivationRows(part), ActivationRows(other))
        torch.testing.assert_close(part.mean, other.mean)
        assert part.rms == pytest.approx(other.rms)


def test_the_provenance_tells_what_is_read(source, cache):
    for name in ("layer", "width", "dataset_hash", "seed", "rows", "sequences"):
        assert source.provenance[name] == cache.provenance[name]
    assert source.provenance["subject"] == "tiny" and source.provenance["source"] == "on_the_fly"


def test_the_moments_of_many_sequences_are_those_of_a_spread_of_them(source, monkeypatch):
    monkeypatch.setattr("consistency_lens.data.on_the_fly.MOMENT_SEQUENCES", 5)
    # 24 sequences of three rows, five of them
    rows = np.concatenate([3 * n + np.arange(3) for n in np.linspace(0, 23, 5).astype(int)])
    torch.testing.assert_close(source.mean, torch.tensor(source.activations(rows).mean(axis=0)))


def test_rows_of_a_sequence_are_read_in_one_pass(subject, source, monkeypatch):
    passes = []
    forward = subject.model.forward

    def counted(*args, **kwargs):
        passes.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(subject.model, "forward", counted)
    twice = source.activations(np.array([5, 3, 4, 3, 70]))
    assert [shape[0] for shape in passes] == [2]
    np.testing.assert_allclose(twice[1], twice[3])
    np.testing.assert_allclose(twice[0], source.activations(np.array([5]))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep_context", [False, True])
def test_a_batch_of_contexts_gets_the_activations_of_its_rows(subject, source, cache, keep_context):
    collate = ActivationCollator(0, 4)
    loader = DataLoader(ContextRows(source, pair_seed=1), batch_size=7, collate_fn=collate)
    expected = DataLoader(ActivationRows(cache, pair_seed=1), batch_size=7, collate_fn=collate)
    for batch, of_cache in zip(loader, expected, strict=True):
        assert "activations" not in batch
        read = read_activations(subject, batch, keep_context)
        assert ("context" in read) == keep_context
        for name in of_cache:
            torch.testing.assert_close(read[name], of_cache[name], rtol=1e-5, atol=1e-6)


def test_what_is_kept_of_the_context_is_what_the_subject_would_read_again(subject, source):
    batch = next(iter(DataLoader(ContextRows(source), batch_size=7, collate_fn=ActivationCollator(0, 4))))
    kept = read_activations(subject, batch, keep_context=True)["context"]
    again = subject.context(batch["input_ids"], batch["attention_mask"], batch["positions"][:, None])
    assert torch.equal(kept.logits, again.logits)
    assert kept.cache is not None and torch.equal(kept.cache[0][-1][0], again.cache[0][-1][0])


@pytest.mark.parametrize("keep_context", [False, True])
def test_the_blocks_above_the_layer_run_for_the_context_alone(subject, source, keep_context):
    ran = []
    blocks = subject.stream.blocks
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    batch = next(iter(DataLoader(ContextRows(source), batch_size=4, collate_fn=ActivationCollator(0, 4))))
    subject.check_one_token(64)
    ran.clear()
    read_activations(subject, batch, keep_context)
    for hook in hooks:
        hook.remove()
    assert sorted(set(ran)) == list(range(len(blocks) if keep_context else LAYER + 1))


def test_a_corpus_that_does_not_fit_the_subject_is_refused(subject):
    too_short = corpus_from_rows({"input_ids": [1] * 3, "document": n} for n in range(3))
    with pytest.raises(ValueError, match="has 3 tokens, too short for min_position=4"):
        OnTheFlyActivations.from_corpus(subject, too_short, {}, **SETTINGS)
    foreign = corpus_from_rows({"input_ids": [999] * 9, "document": n} for n in range(3))
    with pytest.raises(ValueError, match="token ids from 999 to 999, but the subject's vocabulary is 30"):
        OnTheFlyActivations.from_corpus(subject, foreign, {}, **SETTINGS)
