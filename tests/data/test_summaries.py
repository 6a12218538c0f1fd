import json

import numpy as np
import pytest
import torch
from tiny_lenses import LAYER, tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.data.collator import ActivationCollator
from consistency_lens.data.summaries import SummaryRows, read_summaries
from consistency_lens.subject import Subject

PAIRS = [
    {"context": "w3 w4 w5 w6", "summary": "w9"},
    {"context": "w7 w8", "summary": "w10 w11 w12 w13 w14"},
    {"context": "w20 w21 w22", "summary": "w30 w31"},
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(pair)}\n" for pair in PAIRS))
    return str(path)


@pytest.fixture(scope="module")
def subject():
    return Subject(tiny_model("llama"), LAYER)


def test_a_row_has_the_activation_at_the_end_of_its_context(source, subject):
    rows = SummaryRows(read_summaries(source), subject, tiny_tokenizer(), max_length=16, first_row=100, batch_size=2)
    assert len(rows) == 3 and rows[1]["row"] == 101 and rows[1]["position"] == 2
    for row in rows:
        ids = torch.as_tensor(row["input_ids"])[None]
        alone = subject.activations(ids, torch.ones_like(ids))[0, -1]
        np.testing.assert_allclose(row["activation"], alone.numpy(), atol=1e-5)


def test_the_summary_stands_in_place_of_the_tail(source, subject):
    rows = SummaryRows(read_summaries(source), subject, tiny_tokenizer(), max_length=16)
    batch = ActivationCollator(0, 4, bos_token_id=1)(list(rows))
    assert batch["tail_ids"][1].tolist() == [10, 11, 12, 13]
    assert batch["given_text"].all()
    assert batch["tail_ids"][0].tolist() == [0, 0, 0, 9] and batch["tail_mask"][0].tolist() == [False] * 3 + [True]


def test_a_long_context_keeps_its_end(source, subject):
    rows = SummaryRows(read_summaries(source), subject, tiny_tokenizer(), max_length=3)
    assert rows[0]["input_ids"].tolist() == [1, 5, 6]


def test_unusable_pairs_are_named(tmp_path):
    with pytest.raises(ValueError, match="summaries: cannot read"):
        read_summaries(str(tmp_path / "nothing.jsonl"))
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "w3", "summary": "w4"}\n')
    with pytest.raises(ValueError, match="needs rows with the columns context and summary, got 1 with"):
        read_summaries(str(other))
    other.write_text('{"context": "w3", "summary": ""}\n')
    with pytest.raises(ValueError, match="the summary of row 0 is no text, or an empty one"):
        read_summaries(str(other))
