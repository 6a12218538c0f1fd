"""The pipeline task, as `transformers.pipeline` makes it."""

import pytest
import torch
from tiny_lenses import activations, tiny_lens
from tiny_tuned_lenses import tiny_tuned_lens
from transformers import pipeline

TASK, TEXT = "activation-to-text", "w3 w9 w27"


@pytest.fixture(scope="module")
def lens():
    return tiny_lens()


@pytest.fixture(scope="module")
def read(lens):
    return pipeline(TASK, model=lens, device="cpu")


def test_each_token_of_a_text_is_explained(lens, read):
    rows = read(TEXT)
    assert rows == lens.explain(TEXT).to_dict()["tokens"]
    assert [row["token"] for row in rows] == TEXT.split()
    assert {"text", "fve", "kl", "top_before", "top_after"} < rows[0].keys()


def test_several_texts_and_some_positions(read):
    both = read([TEXT, "w5 w6"], positions=[2])
    assert [[row["token"] for row in rows] for rows in both] == [["w9"], ["w6"]]


def test_activations_are_read_as_the_lens_reads_them(lens, read):
    A = activations(3)
    rows = read(list(A))
    assert [row["text"] for (row,) in rows] == lens.decode(A).texts
    again = lens.encode(lens.decode(A).token_ids)
    fve = 1 - (A - again).square().sum(-1) / (A - lens.mean).square().sum(-1)
    torch.testing.assert_close(torch.tensor([row["fve"] for (row,) in rows]), fve)
    assert [row["text"] for row in read([A])[0]] == lens.decode(A).texts


def test_it_loads_a_lens_by_its_place(lens, read, tmp_path):
    lens.subject.model.save_pretrained(tmp_path / "subject")
    read.save_pretrained(tmp_path / "lens")
    loaded = pipeline(TASK, model=str(tmp_path / "lens"), model_kwargs={"base_model": str(tmp_path / "subject")})
    assert [row["text"] for row in loaded(TEXT)] == [row["text"] for row in read(TEXT)]


def test_mistakes_are_told(lens, read):
    with pytest.raises(ValueError, match="needs a ConsistencyLensModel, got TunedLens"):
        pipeline(TASK, model=tiny_tuned_lens(), device="cpu")
    with pytest.raises(TypeError, match="no argument 'position'"):
        read(TEXT, position=[2])
    with pytest.raises(ValueError, match="positions are of a text"):
        read(activations(1)[0], positions=[1])
    with pytest.raises(ValueError, match=r"activations must be \(B, 32\)"):
        read(torch.zeros(7))
