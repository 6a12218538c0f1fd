"""The check in `evaluation.steering`; what users call is tested in tests/test_steering.py."""

import json

import pytest
import torch
from checked_rows import evaluated_rows
from tiny_lenses import NUM_TEXT_TOKENS, PROMPTS, disturb, tiny_lens
from tiny_models import NUM_LAYERS

from consistency_lens.evaluation import steering
from consistency_lens.evaluation.steering import edit_and_steer, edit_directions, last_indices

LENGTHS = (12, 9, 3, 7, 12, 8, 4, 15, 11, 6) * 4
NUMBERS = {"target_logprob_change", "own_top_logprob_change", "target_rises"}


# With tied embeddings a random model has few tokens to say.
UNTIED = {"tie_word_embeddings": False}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lens(request):
    return disturb(tiny_lens(request.param, model=UNTIED, **PROMPTS))


@pytest.fixture(scope="module")
def evaluated(lens):
    return evaluated_rows(lens, *LENGTHS)


def next_tokens(evaluated):
    """The subject's likeliest next token of each row, (N,)."""
    tops = []
    for _, batch in evaluated:
        logits = evaluated.lens.subject.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        tops.append(logits[torch.arange(len(logits)), batch["positions"]].argmax(-1))
    return torch.cat(tops)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def written(request):
    """Rows at the subject's last block, whose texts end in the subject's next token."""
    evaluated = evaluated_rows(tiny_lens(request.param, model=UNTIED, layer=NUM_LAYERS - 1), *LENGTHS)
    evaluated.text_ids[:, -1] = next_tokens(evaluated)
    return evaluated


class TestWhereWordsAreTheNextToken:
    """E points at the last word's row of the unembedding. So what the words say is what the subject does."""

    @pytest.fixture
    def toy(self, written, monkeypatch):
        table = written.lens.subject.model.get_output_embeddings().weight.detach()
        monkeypatch.setattr(written.lens, "encode", lambda ids: 3 * table[ids[:, -1]])
        return written

    def test_the_target_rises_and_the_own_top_falls(self, toy):
        result = edit_and_steer(toy, seed=0, rows=100)
        assert result["rows"] > 10
        assert result["target_rises"] == 1
        assert result["target_logprob_change"] > 1
        assert result["own_top_logprob_change"] < -1

    def test_random_steps_do_next_to_nothing_to_the_target(self, toy):
        result = edit_and_steer(toy, seed=0, rows=100)
        for name in ("random_token", "random_direction"):
            control = result["controls"][name]
            assert abs(control["target_logprob_change"]) < 0.35 * result["target_logprob_change"], name
            assert 0.1 < control["target_rises"] < 0.9, name

    def test_words_that_the_encoder_does_not_read_change_nothing(self, toy, monkeypatch):
        monkeypatch.setattr(toy.lens, "encode", lambda ids: toy.lens.mean.expand(len(ids), -1))
        result = edit_and_steer(toy, seed=0, rows=100)
        # No step has a length, the random ones included.
        for values in (result, *result["controls"].values()):
            assert values["target_logprob_change"] == pytest.approx(0, abs=1e-4)


def test_the_changes_are_those_of_full_passes(lens):
    """Two rows that are each other's donors; the steps are taken by hand."""
    pair = evaluated_rows(lens, 12, 9)
    ids, batch, subject = pair.text_ids, pair.batches[0], lens.subject
    ids[:] = torch.tensor([[9, 10, 11, 12], [20, 21, 22, 23]])
    batch["document"][:] = torch.tensor([3, 4])
    context = subject.context(batch["input_ids"], batch["attention_mask"], batch["positions"][:, None])
    tops = next_tokens(pair)
    assert tops[0] != tops[1]
    edited = ids.clone()
    edited[:, -1] = ids.flip(0)[:, -1]
    steps = lens.encode(edited) - lens.encode(ids)
    with torch.no_grad():
        after = subject.replaced_logits_full(context, (batch["activations"] + steps)[:, None])
    change = (after.log_softmax(-1) - context.logits.log_softmax(-1))[:, 0]
    result = edit_and_steer(pair, seed=0, rows=2)
    assert result["rows"] == 2
    expected_target, expected_own = (change[[0, 1], tokens].mean().item() for tokens in (tops.flip(0), tops))
    assert result["target_logprob_change"] == pytest.approx(expected_target, abs=1e-4)
    assert result["own_top_logprob_change"] == pytest.approx(expected_own, abs=1e-4)
    assert abs(expected_target) > 1e-3


class TestOnALens:
    def test_has_these_keys_and_is_json(self, evaluated):
        result = edit_and_steer(evaluated, seed=0, rows=5)
        assert set(result) == NUMBERS | {"rows", "controls"}
        assert set(result["controls"]) == {"random_token", "random_direction"}
        assert all(set(control) == NUMBERS for control in result["controls"].values())
        assert 0 < result["rows"] <= 5
        json.dumps(result, allow_nan=False)

    def test_does_not_depend_on_the_batch_size(self, lens, evaluated):
        result = edit_and_steer(evaluated, seed=1, rows=12)
        again = edit_and_steer(evaluated_rows(lens, *LENGTHS, batch_size=40), seed=1, rows=12)
        assert again["rows"] == result["rows"] > 4
        for name in ("target_logprob_change", "own_top_logprob_change"):
            assert again[name] == pytest.approx(result[name], abs=1e-4)
            for control, values in result["controls"].items():
                assert again["controls"][control][name] == pytest.approx(values[name], abs=1e-4)

    def test_a_seed_fixes_everything_and_the_random_state_is_left_alone(self, evaluated):
        state = torch.random.get_rng_state()
        first, again, other = (edit_and_steer(evaluated, seed, rows=8) for seed in (0, 0, 1))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert first == again
        assert first["target_logprob_change"] != other["target_logprob_change"]


def test_every_step_along_another_token_is_a_step(lens, monkeypatch):
    """Though most texts end alike: a control that stays where it is would be compared with an edit that moves."""
    evaluated = evaluated_rows(lens, *LENGTHS)
    evaluated.text_ids[:, -1] = torch.tensor([9, 9, 9, 10, 11] * 8)
    replaced = []

    def spy(lens, text_ids, ends, replacements):
        replaced.append((text_ids.gather(1, ends), replacements))
        return edit_directions(lens, text_ids, ends, replacements)

    monkeypatch.setattr(steering, "edit_directions", spy)
    result = edit_and_steer(evaluated, seed=0, rows=100)
    own, others = (torch.cat(parts) for parts in zip(*replaced, strict=True))
    assert len(own) == result["rows"] > 5
    assert (others != own).all()


class TestErrorsAndEdges:
    def test_texts_that_all_end_alike_leave_nothing_to_steer(self, lens):
        evaluated = evaluated_rows(lens, 12, 9, 7, 8)
        evaluated.text_ids[:, -1] = 9
        result = edit_and_steer(evaluated, seed=0, rows=4)
        nothing = dict.fromkeys(NUMBERS, 0)
        assert result == {"rows": 0, **nothing, "controls": {"random_token": nothing, "random_direction": nothing}}

    def test_rows_with_the_same_next_token_are_left_out(self, lens):
        evaluated = evaluated_rows(lens, 9, 9, 9, 9)
        evaluated.text_ids[:, -1] = torch.arange(9, 13)
        assert edit_and_steer(evaluated, seed=0, rows=4)["rows"] > 0
        evaluated.batches[0]["input_ids"][:] = evaluated.batches[0]["input_ids"][:1].clone()
        assert edit_and_steer(evaluated, seed=0, rows=4)["rows"] == 0

    def test_one_document(self, lens):
        with pytest.raises(ValueError, match="steering: needs rows of two documents at least, got 2 rows of one"):
            edit_and_steer(evaluated_rows(lens, 12, 9), seed=0, rows=4)

    def test_no_rows(self, evaluated):
        with pytest.raises(ValueError, match="steering: rows must be at least 1, got 0"):
            edit_and_steer(evaluated, seed=0, rows=0)

    def test_the_last_token_is_the_one_before_the_stop_token(self):
        ids = torch.tensor([[9, 10, 2, 11], [9, 10, 11, 12]])
        assert last_indices(tiny_lens(stop_token_id=2), ids).tolist() == [[1], [3]]
        assert last_indices(tiny_lens(), ids).tolist() == [[NUM_TEXT_TOKENS - 1]] * 2
