"""How many tokens a model reads, whatever its configuration calls it."""

import pytest
import torch
from tiny_lenses import tiny_lens
from tiny_models import MAX_POSITIONS, random_tokens, tiny_model
from transformers import AutoConfig

from consistency_lens import Subject
from consistency_lens.context_length import context_length


@pytest.mark.parametrize(
    ("family", "length"),
    [("llama", MAX_POSITIONS), ("gpt2", MAX_POSITIONS), ("mpt", 2048), ("gpt1", 512), ("bloom", None)],
)
def test_is_that_of_the_configuration(family, length):
    assert context_length(tiny_model(family).config) == length


def test_of_a_model_for_more_than_text_it_is_that_of_the_text():
    config = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 77})
    assert context_length(config) == 77


def test_mpt_reads_its_longest_text_and_refuses_a_longer_one():
    lens = tiny_lens("mpt", model={"max_seq_len": 20})
    longest = " ".join(["w9"] * 19)  # behind BOS
    assert len(lens.explain(longest)) == 19
    with pytest.raises(ValueError, match="explain: the text has 21 tokens, the subject reads 20"):
        lens.explain(f"{longest} w9")
    ids, mask = random_tokens(20)
    assert Subject(lens.subject.model, 1).context(ids, mask, torch.tensor([[19]])).logits.isfinite().all()
