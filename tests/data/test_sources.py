"""Which rows the arguments name. What the rows hold is tested with each source."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from published_rows import published
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.data import sources, text_source
from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.corpus import is_validation_document
from consistency_lens.data.on_the_fly import ContextRows
from consistency_lens.data.sources import SourceArguments, layer_of, open_rows
from consistency_lens.data.text_source import Reader
from consistency_lens.data.tokenization import TokenizationArguments, tokenize_corpus
from consistency_lens.subject import Subject

LAYER = 1

TEXT = "\n<|endoftext|>\n".join(" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(14)) for i in range(40))
SETTINGS = {"max_length": 16, "positions_per_sequence": 3, "min_position": 4, "validation_fraction": 0.3}


@pytest.fixture(scope="module")
def reader():
    return Reader(Subject(tiny_model("llama"), LAYER), tiny_tokenizer(), "tiny")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def rows_of(reader, folder, pair_seed=None, **settings):
    return open_rows(SourceArguments(**(SETTINGS | settings)), reader, folder, seed=0, pair_seed=pair_seed)


def assert_equal_rows(some, others):
    assert len(some) == len(others)
    for index in range(len(some)):
        for name, value in some[index].items():
            np.testing.assert_allclose(value, others[index][name], atol=1e-5)


def test_a_cache_on_the_fly_and_a_folder_give_the_same_rows(reader, text, tmp_path):
    built = rows_of(reader, tmp_path / "data", pair_seed=1, dataset=text)
    on_the_fly = rows_of(reader, tmp_path / "none", pair_seed=1, dataset=text, activations="on_the_fly")
    folder = rows_of(reader, tmp_path / "none", pair_seed=1, activations=str(tmp_path / "data/activations-layer1"))
    assert not (tmp_path / "none").exists()
    assert isinstance(on_the_fly.train, ContextRows) and built.train is built.true_text
    for other in (on_the_fly, folder):
        assert_equal_rows(built.true_text, other.true_text)
        assert_equal_rows(built.held_out, other.held_out)
        torch.testing.assert_close(built.mean, other.mean)
        assert built.rms == pytest.approx(other.rms)
    assert {row["document"] for row in built.true_text}.isdisjoint({row["document"] for row in built.held_out})


def test_the_subject_writes_its_own_text_once(reader, tmp_path, monkeypatch):
    settings = {"num_documents": 30, "activations": "on_the_fly"}
    first = rows_of(reader, tmp_path, **settings)
    monkeypatch.setattr(text_source, "sample_documents", None)
    assert_equal_rows(first.held_out, rows_of(reader, tmp_path, **settings).held_out)


def test_two_runs_do_not_write_the_same_text_at_once(reader, tmp_path, monkeypatch):
    settings = {"num_documents": 30, "activations": "on_the_fly"}
    monkeypatch.setattr(text_source, "sample_documents", lambda *_, **__: rows_of(reader, tmp_path, **settings))
    with pytest.raises(ValueError, match="cache_dir: another run is writing documents in .*; wait for it, or pass an"):
        rows_of(reader, tmp_path, **settings)
    monkeypatch.undo()
    rows_of(reader, tmp_path, **settings)
    assert [path.name[:6] for path in tmp_path.iterdir()] == ["corpus"]


def test_two_caches_in_a_folder_are_its_splits(reader, text, tmp_path):
    rows_of(reader, tmp_path / "a", dataset=text)
    other = tmp_path / "other.txt"
    other.write_text("\n<|endoftext|>\n".join(document + " w9" for document in TEXT.split("\n<|endoftext|>\n")))
    rows_of(reader, tmp_path / "b", dataset=str(other))
    both = tmp_path / "both"
    both.mkdir()
    (tmp_path / "a/activations-layer1").rename(both / "train")
    (tmp_path / "b/activations-layer1").rename(both / "validation")
    found = rows_of(reader, tmp_path, activations=str(both))
    train, validation = (ActivationCache.open(both / split) for split in ("train", "validation"))
    assert len(found.train) == len(train)
    assert torch.equal(found.mean, train.mean)
    # of the validation rows those are left that no training context begins with
    assert 0 < len(found.held_out) < len(validation)
    assert {row["document"] for row in found.held_out} <= set(validation.documents)
    assert layer_of(SourceArguments(activations=str(both))) == LAYER


def test_published_activations_are_streamed(reader, text, tmp_path, monkeypatch):
    rows_of(reader, tmp_path, dataset=text)
    cache = ActivationCache.open(tmp_path / "activations-layer1")
    parts = dict(zip(("train", "validation"), cache.split(0.3), strict=True))
    opened = []

    def open_stream(repo, split, revision=None, pair_seed=None, window=8):
        opened.append((repo, split, revision, window))
        return published(parts[split]).stream(pair_seed=pair_seed, window=window)

    monkeypatch.setattr(sources, "open_stream", open_stream)
    arguments = {"activations": "someone/activations", "activations_revision": "v1", "stream_window": 3}
    rows = rows_of(reader, tmp_path, pair_seed=0, **arguments)
    assert opened == [("someone/activations", split, "v1", 3) for split in ("train", "validation")]
    assert len(rows.train) == len(parts["train"]) and torch.equal(rows.mean, cache.mean)
    assert {row["document"] for row in rows.held_out} <= set(parts["validation"].documents)
    assert rows.fraction is None and isinstance(rows.held_out, list) and "other_activation" in rows.held_out[0]
    assert layer_of(SourceArguments(activations="someone/activations")) == LAYER


@pytest.mark.parametrize("name", ["weights_hash", "tokenizer_hash", "layer", "width"])
@pytest.mark.parametrize("streamed", [False, True])
def test_activations_of_another_subject_are_refused_with_both_values(
    reader, text, tmp_path, monkeypatch, name, streamed
):
    rows_of(reader, tmp_path, dataset=text)
    path = tmp_path / "activations-layer1"
    own = json.loads((path / "provenance.json").read_text())[name]
    other = 7 if isinstance(own, int) else "abc"
    (path / "provenance.json").write_text(
        json.dumps(json.loads((path / "provenance.json").read_text()) | {name: other})
    )
    if streamed:
        cache = ActivationCache.open(path)
        monkeypatch.setattr(sources, "open_stream", lambda *_args: published(cache).stream())
    with pytest.raises(ValueError, match=rf"has {name} {other!r}.*, but the lens has {own!r}"):
        rows_of(reader, tmp_path, activations="someone/activations" if streamed else str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dataset": "text.txt", "activations": "folder"},
            "dataset: got 'text.txt', but the activations 'folder' are",
        ),
        ({"stream_window": 0}, "stream_window must be at least 1, got 0"),
        ({"cache_dtype": "int8"}, "cache_dtype must be float16 or float32, got 'int8'"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie between 0 and 1, got 1.0"),
        ({"max_length": 5, "min_position": 4}, "max_length 5 leaves no position after min_position 4"),
    ],
)
def test_arguments_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        SourceArguments(**settings)


@pytest.mark.parametrize("streamed", [False, True])
def test_splits_that_share_documents_are_refused(reader, text, tmp_path, monkeypatch, streamed):
    both = tmp_path / "both"
    for split, seed in (("train", 0), ("validation", 1)):
        arguments = SourceArguments(**SETTINGS, dataset=text)
        open_rows(arguments, reader, tmp_path / split, seed=seed)
        both.mkdir(exist_ok=True)
        (tmp_path / split / "activations-layer1").rename(both / split)
    if streamed:
        monkeypatch.setattr(
            sources, "open_stream", lambda _, split, *rest: published(ActivationCache.open(both / split)).stream()
        )
    with pytest.raises(ValueError, match="train and validation share [0-9]+ documents"):
        rows_of(reader, tmp_path, activations="user/activations" if streamed else str(both))


def test_the_share_that_a_corpus_holds_out_is_its_own(reader, text, tmp_path):
    reader.tokenizer.save_pretrained(tmp_path / "subject")
    reader.subject.model.save_pretrained(tmp_path / "subject")
    corpus = TokenizationArguments(
        dataset=text, model=str(tmp_path / "subject"), output_dir=str(tmp_path / "corpus"), validation_fraction=0.2
    )
    tokenize_corpus(corpus)
    rows = rows_of(reader, tmp_path / "data", dataset=str(tmp_path / "corpus"))
    assert rows.fraction == 0.2
    assert all(is_validation_document(row["document"], 0.2) for row in rows.held_out)
    assert not any(is_validation_document(row["document"], 0.2) for row in rows.true_text)
    # a text in the same folder has a cache of its own
    assert rows_of(reader, tmp_path / "data", dataset=text).fraction == 0.3


def test_what_a_lens_recorded_before_is_understood():
    assert SourceArguments.recorded({"text_file": "a.txt"}).dataset == "a.txt"
    assert SourceArguments.recorded({"text_file": None}).dataset is None


def test_a_folder_without_a_cache_is_a_mistake(reader, tmp_path):
    with pytest.raises(ValueError, match="activation cache: no cache at"):
        rows_of(reader, tmp_path, activations=str(tmp_path))


@pytest.mark.parametrize("name", ["outputs/no/such/folder", "nowhere"])
def test_what_can_be_no_hub_id_is_a_mistake(reader, tmp_path, name):
    with pytest.raises(ValueError, match=f"no cache at '{name}'; pass the folder of one, the Hub id of a published"):
        rows_of(reader, tmp_path, activations=name)


def test_recorded_arguments_are_taken_up_with_changes():
    record = dataclasses.asdict(SourceArguments(dataset="a.txt", max_length=99)) | {"layer": 3, "model": "gpt2"}
    assert SourceArguments.recorded(record) == SourceArguments(dataset="a.txt", max_length=99)
    assert SourceArguments.recorded(record, dataset=None, activations="b").activations == "b"


def test_a_known_hash_is_taken_for_the_weights(reader):
    known = Reader(reader.subject, reader.tokenizer, "tiny", known_hash="abc")
    assert known.identity["weights_hash"] == "abc" != reader.identity["weights_hash"]
