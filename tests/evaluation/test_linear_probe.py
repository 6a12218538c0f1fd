import pytest
import torch
from tiny_lenses import NUM_TEXT_TOKENS, tiny_lens
from tiny_models import WIDTH

from consistency_lens.evaluation import linear_probe as module
from consistency_lens.evaluation.evaluated import EvaluatedRows
from consistency_lens.evaluation.linear_probe import linear_probe, probed_tokens, standardised

# As many tokens as the code below has room for in the width: 8 of them at 4 places.
FIRST_TOKEN, NUM_TOKENS = 3, WIDTH // NUM_TEXT_TOKENS
STOP = 90


@pytest.fixture(scope="module")
def lens():
    return tiny_lens()


def planted(rows: int, seed: int, places: int = NUM_TEXT_TOKENS) -> dict[str, torch.Tensor]:
    """Random tails, and activations that hold the last `places` of their tokens, in directions of their own."""
    generator = torch.Generator().manual_seed(seed)
    tails = torch.randint(NUM_TOKENS, (rows, NUM_TEXT_TOKENS), generator=generator)
    one_hot = torch.nn.functional.one_hot(tails, NUM_TOKENS).float()
    one_hot[:, : NUM_TEXT_TOKENS - places] = 0
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))
    return {
        "activations": one_hot.flatten(1) @ mixing + 3,
        "tail_ids": tails + FIRST_TOKEN,
        "tail_mask": torch.ones_like(tails, dtype=torch.bool),
        "document": torch.arange(rows) // 2,
    }


def probe(lens, held_out, training, text_ids=None, seed=0):
    text_ids = held_out["tail_ids"] if text_ids is None else text_ids
    batches = [{name: tensor[start : start + 32] for name, tensor in held_out.items()} for start in range(0, 60, 32)]
    return linear_probe(EvaluatedRows(lens, batches, text_ids), training, seed)


class TestProbe:
    def test_recovers_a_planted_linear_code(self, lens):
        result = probe(lens, planted(60, seed=1), planted(400, seed=0))
        assert result["probe_accuracy"] == [1.0] * NUM_TEXT_TOKENS

    def test_lists_run_from_the_token_at_the_position_backwards(self, lens):
        result = probe(lens, planted(60, seed=1, places=1), planted(400, seed=0, places=1))
        assert result["probe_accuracy"][0] == 1.0
        assert max(result["probe_accuracy"][1:]) < 0.4  # chance is 1 in 8

    def test_common_classes_do_not_hide_behind_each_other(self):
        # Ten classes in a row on one line: least squares onto one-hot never names those in the middle.
        tokens = torch.arange(10).repeat(40)
        noise = 0.05 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        features = torch.stack([tokens.double(), torch.zeros(400)], dim=1) + noise
        features, _ = standardised(features, features)
        assert torch.equal(probed_tokens(features, tokens, features), tokens)

    def test_means_of_tokens_that_blur_are_shrunk(self, monkeypatch):
        generator = torch.Generator().manual_seed(0)
        # Two common tokens that can be told apart, and 100 rare ones whose means are nothing but noise.
        tokens = torch.cat([torch.arange(2).repeat_interleave(300), 2 + torch.arange(100).repeat(8)])
        tokens = tokens[torch.randperm(len(tokens), generator=generator)]
        centres = torch.zeros(102, 64, dtype=torch.float64)
        centres[0, 0], centres[1, 0] = 1.5, -1.5
        features = centres[tokens] + torch.randn(len(tokens), 64, generator=generator, dtype=torch.float64)
        train, held_out = slice(0, 1000), slice(1000, None)

        def accuracy():
            named = probed_tokens(features[train], tokens[train], features[held_out])
            return float((named == tokens[held_out]).double().mean())

        chosen = accuracy()
        monkeypatch.setattr(module, "SHRINKAGES", (0,))
        assert chosen > accuracy() + 0.05

    def test_a_token_that_training_rows_do_not_end_in_is_not_named(self, lens):
        held_out = planted(60, seed=1)
        held_out["tail_ids"][:15, -1] = 50
        result = probe(lens, held_out, planted(400, seed=0))
        assert result["probe_accuracy"] == [0.75, 1.0, 1.0, 1.0]

    def test_a_dimension_that_never_varies_does_no_harm(self, lens):
        held_out, training = planted(60, seed=1), planted(400, seed=0)
        for rows in (held_out, training):
            rows["activations"] = rows["activations"] @ torch.eye(WIDTH)
            rows["activations"][:, -1] = 7
        result = probe(lens, held_out, training)
        assert min(result["probe_accuracy"]) > 0.8


class TestTexts:
    def test_a_text_names_its_tokens_wherever_they_stand(self, lens):
        held_out = planted(60, seed=1)
        result = probe(lens, held_out, planted(400, seed=0), text_ids=held_out["tail_ids"].flip(1))
        assert result["named_by_text"] == [1.0] * NUM_TEXT_TOKENS

    def test_the_text_of_another_document_names_them_by_chance(self, lens):
        held_out = planted(60, seed=1)
        # One token that every text holds, the rest of which is of no row.
        texts = torch.full_like(held_out["tail_ids"], 80)
        texts[:, 2] = FIRST_TOKEN
        result = probe(lens, held_out, planted(400, seed=0), text_ids=texts)
        shares = (held_out["tail_ids"].flip(1) == FIRST_TOKEN).double().mean(0).tolist()
        assert result["named_by_text"] == result["named_by_shuffled_text"] == pytest.approx(shares)

    def test_the_shuffled_text_is_never_of_the_own_document(self, lens):
        held_out = planted(60, seed=1)
        # The tails of a document are of its own two tokens.
        held_out["tail_ids"] = 3 + held_out["document"][:, None] + torch.zeros(60, NUM_TEXT_TOKENS, dtype=torch.long)
        result = probe(lens, held_out, planted(400, seed=0))
        assert result["named_by_shuffled_text"] == [0.0] * NUM_TEXT_TOKENS

    def test_what_follows_the_stop_token_is_no_text(self):
        held_out = planted(60, seed=1)
        texts = torch.full_like(held_out["tail_ids"], STOP)
        texts[:, 0], texts[:, -1] = held_out["tail_ids"][:, -1], held_out["tail_ids"][:, 0]
        # so that the first token is not the last one again
        held_out["tail_ids"][:, 0] = FIRST_TOKEN + (held_out["tail_ids"][:, -1] - FIRST_TOKEN + 1) % NUM_TOKENS
        texts[:, -1] = held_out["tail_ids"][:, 0]
        result = probe(tiny_lens(stop_token_id=STOP), held_out, planted(400, seed=0), text_ids=texts)
        assert (result["named_by_text"][0], result["named_by_text"][-1]) == (1.0, 0.0)


class TestMasks:
    def test_rows_whose_context_is_too_short_are_left_out(self, lens):
        held_out, training = planted(60, seed=1), planted(400, seed=0)
        for rows in (held_out, training):
            rows["tail_mask"][::3, 0] = False
            rows["tail_ids"][::3, 0] = 0  # padding, which neither the activation nor the text holds
        result = probe(lens, held_out, training, text_ids=held_out["tail_ids"].masked_fill(~held_out["tail_mask"], 77))
        assert result["rows"] == [60, 60, 60, 40]
        assert result["probe_accuracy"] == result["named_by_text"] == [1.0] * NUM_TEXT_TOKENS

    @pytest.mark.parametrize("part", ["held_out", "training"])
    def test_an_offset_that_no_row_reaches_has_shares_of_0(self, lens, part):
        rows = {"held_out": planted(60, seed=1), "training": planted(400, seed=0)}
        rows[part]["tail_mask"][:, 0] = False
        result = probe(lens, **rows)
        assert result["probe_accuracy"] == [1.0, 1.0, 1.0, 0.0]
        assert result["rows"][-1] == (0 if part == "held_out" else 60)


def test_is_the_same_every_time_and_leaves_the_global_state_alone(lens):
    held_out, training = planted(60, seed=1), planted(400, seed=0)
    state = torch.random.get_rng_state()
    first, again, other = (probe(lens, held_out, training, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == again
    assert first["named_by_shuffled_text"] != other["named_by_shuffled_text"]
