"""The figures of a cache against the rows themselves."""

import json
from collections import Counter

import numpy as np
import pytest
from cache_builds import ARGUMENTS, NUM_SEQUENCES, make_corpus, make_subject, make_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from consistency_lens.data import cache_description
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.data.cache_description import describe_cache, load_cache_tokenizer, norm_histogram, token_text
from consistency_lens.data.cache_folder import norms

MASSIVE = 17  # a token whose activations are far from all others


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    subject = make_subject()
    subject.model.model.embed_tokens.weight.data[MASSIVE] *= 500
    path = tmp_path_factory.mktemp("caches") / "cache"
    return build_activation_cache(subject, make_corpus(), path, tokenizer=make_tokenizer(), **ARGUMENTS)


@pytest.fixture(scope="module")
def figures(cache):
    return describe_cache(cache, make_tokenizer(), progress=False)


@pytest.fixture(scope="module")
def rows(cache):
    """Norm, position and token at P of every row."""
    activations = cache.activations(np.arange(len(cache)))
    positions = np.array(cache.dataset["position"][:])
    tokens = np.array([context[-1] for context in cache.dataset["input_ids"][:]])
    return norms(activations), positions, tokens


def test_counts_and_sizes_are_those_of_the_files(cache, figures):
    assert figures["rows"] == len(cache) == 3 * NUM_SEQUENCES
    assert figures["documents"] == len(np.unique(cache.documents))
    assert figures["context_tokens"] == sum(len(context) for context in cache.dataset["input_ids"])
    size = sum(file.stat().st_size for file in cache.path.glob("shard-*.arrow"))
    assert figures["disk"] == {"bytes": size, "bytes_per_row": size / len(cache), "shards": 4}
    assert figures["sequences"] == {"kept": NUM_SEQUENCES, "skipped_too_short": 2}
    assert figures["subject"] == "tiny" and "subject_revision" not in figures


def test_quantiles_are_those_of_the_rows(figures, rows):
    found_norms, positions, _ = rows
    assert (figures["position"]["min"], figures["position"]["max"]) == (positions.min(), positions.max())
    assert figures["position"]["median"] == np.quantile(positions, 0.5, method="nearest")
    assert figures["norm"]["max"] == pytest.approx(found_norms.max(), rel=1e-6)
    assert figures["norm"]["95%"] == pytest.approx(np.quantile(found_norms, 0.95, method="nearest"), rel=1e-6)
    assert figures["norm"]["mean"] == pytest.approx(found_norms.mean(), rel=1e-6)


def test_outliers_are_named_with_their_tokens_and_positions(figures, rows):
    found_norms, positions, tokens = rows
    outliers = figures["outliers"]
    far = found_norms > 10 * np.median(found_norms)
    assert outliers["rows"] == far.sum() > 0
    assert outliers["threshold"] == pytest.approx(10 * figures["norm"]["median"])
    counts = Counter(tokens[far].tolist()).most_common()
    assert MASSIVE in dict(counts)
    assert {(token["id"], token["rows"]) for token in outliers["tokens"]} == set(counts)
    assert [token["rows"] for token in outliers["tokens"]] == [count for _, count in counts]
    found = {place["position"]: place["rows"] for place in outliers["positions"]}
    assert found == Counter(positions[far].tolist())


def test_the_token_table_counts_tokens_at_p(figures, rows):
    found_norms, _, tokens = rows
    listed = figures["tokens"]
    assert len(listed) == 20
    assert [token["rows"] for token in listed] == [n for _, n in Counter(tokens.tolist()).most_common(20)]
    for token in listed:
        own = tokens == token["id"]
        assert token["text"] == f"w{token['id']}"
        assert token["rows"] == own.sum() and token["share"] == own.mean()
        assert token["mean_norm"] == pytest.approx(found_norms[own].mean(), rel=1e-6)


def test_blocks_do_not_change_the_figures(cache, figures, monkeypatch):
    monkeypatch.setattr(cache_description, "BLOCK_ROWS", 5)
    assert describe_cache(cache, make_tokenizer(), progress=False) == figures


def test_json_holds_the_figures(figures):
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_without_a_tokenizer_the_ids_stand_alone(cache):
    assert {token["text"] for token in describe_cache(cache, progress=False)["tokens"]} == {None}


def test_tokens_show_the_spaces_that_they_start_with():
    """As sentencepiece and byte-level vocabularies have them; of a first token `decode` alone drops them."""
    pieces = ["a", "▁a", "▁", "▁▁", ",", "▁,", "<0x41>"]
    sentencepiece = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
    sentencepiece.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentencepiece, clean_up_tokenization_spaces=True)
    shown = [token_text(tokenizer, n) for n in range(len(pieces))]
    assert shown == ["a", " a", " ", "  ", ",", " ,", "A"]
    pieces = ["a", "Ġa", "Ġ", "Ã¤", "Ċ", "ĠĠ."]
    byte_level = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
    byte_level.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, clean_up_tokenization_spaces=True)
    assert [token_text(tokenizer, n) for n in range(len(pieces))] == ["a", " a", " ", "ä", "\n", "  ."]


# The histogram


def test_a_wide_histogram_is_log_spaced_and_counts_every_row():
    values = np.concatenate([np.linspace(5, 20, 1000), [4000.0]])
    histogram = norm_histogram(values, bins=10)
    assert histogram["log_spaced"] and sum(histogram["rows"]) == 1001
    ratios = np.divide(histogram["edges"][1:], histogram["edges"][:-1])
    np.testing.assert_allclose(ratios, ratios[0])
    assert histogram["rows"][-1] == 1


def test_a_narrow_histogram_is_linear():
    histogram = norm_histogram(np.linspace(5.0, 20.0, 100), bins=5)
    assert not histogram["log_spaced"] and histogram["rows"] == [20] * 5
    np.testing.assert_allclose(histogram["edges"], [5, 8, 11, 14, 17, 20])


@pytest.mark.parametrize("values", [[3.0] * 7, [0.0] * 7, [0.0, 1.0, 9.0]])
def test_equal_norms_and_zeros_have_a_histogram(values):
    histogram = norm_histogram(np.array(values))
    assert sum(histogram["rows"]) == len(values) and np.isfinite(histogram["edges"]).all()


# Whose tokens


def test_the_tokenizer_is_the_one_that_the_provenance_names(cache, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "own")
    make_tokenizer(29).save_pretrained(tmp_path / "other")
    provenance = cache.provenance | {"tokenizer": str(tmp_path / "own")}
    tokenizer = load_cache_tokenizer(provenance)
    assert tokenizer is not None and tokenizer.decode([7]) == "w7"
    assert load_cache_tokenizer(cache.provenance, str(tmp_path / "own")) is not None
    # one that would lie is not used, and to ask for it is a mistake
    assert load_cache_tokenizer(cache.provenance | {"tokenizer": str(tmp_path / "other")}) is None
    with pytest.raises(ValueError, match="other' is not the one that the cache was made with"):
        load_cache_tokenizer(cache.provenance, str(tmp_path / "other"))


def test_a_tokenizer_that_is_not_to_be_had_leaves_ids(cache, tmp_path):
    assert load_cache_tokenizer(cache.provenance | {"tokenizer": "nobody/nothing"}) is None
    with pytest.raises(ValueError, match="tokenizer: cannot load 'nobody/nothing'"):
        load_cache_tokenizer(cache.provenance, "nobody/nothing")
