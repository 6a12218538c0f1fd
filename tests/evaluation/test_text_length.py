import json

import pytest
import torch
from checked_rows import evaluated_rows
from tiny_lenses import NUM_TEXT_TOKENS, PROMPTS, disturb, tiny_lens
from tiny_models import WIDTH

from consistency_lens.evaluation.evaluated import EvaluatedRows
from consistency_lens.evaluation.metrics import first_kept, fve, kl_recovered, last_kept
from consistency_lens.evaluation.text_length import PARTS, text_length, text_lengths
from consistency_lens.losses import kl_divergence


@pytest.fixture(scope="module")
def lens():
    return disturb(tiny_lens(**PROMPTS))


@pytest.fixture(scope="module")
def evaluated(lens):
    return evaluated_rows(lens)


@pytest.fixture(scope="module")
def found(evaluated):
    return text_length(evaluated, num_bootstrap=100, seed=0)


def kl_of(evaluated, reconstructions):
    """KL (N,) by full passes of the subject."""
    subject, values = evaluated.lens.subject, []
    for rows, batch in evaluated:
        context = subject.context(batch["input_ids"], batch["attention_mask"], batch["positions"][:, None])
        after = subject.replaced_logits_full(context, reconstructions[rows, None])
        values.append(kl_divergence(context.logits, after)[:, 0])
    return torch.cat(values)


@pytest.mark.parametrize("part", ["first", "last"])
@pytest.mark.parametrize("tokens", [1, 3, NUM_TEXT_TOKENS])
def test_what_is_read_is_the_text_cut(lens, evaluated, found, part, tokens):
    ids = evaluated.text_ids
    activations = evaluated.column("activations")
    with torch.no_grad():
        read = lens.encode(ids[:, :tokens] if part == "first" else ids[:, -tokens:])
        worth = kl_recovered(kl_of(evaluated, read), kl_of(evaluated, lens.mean.expand_as(activations)))
    assert found["tokens"][tokens - 1] == tokens
    assert found[part]["fve"][tokens - 1] == pytest.approx(float(fve(activations, read, lens.mean)), abs=1e-5)
    assert found[part]["kl_recovered"][tokens - 1] == pytest.approx(float(worth), abs=1e-4)


def test_the_end_of_the_context_is_read_as_far_as_there_is_one(lens, evaluated, found):
    tails, masks = evaluated.column("tail_ids"), evaluated.column("tail_mask")
    assert not masks.all()
    read = [lens.encode(ids[mask][-2:][None]) for ids, mask in zip(tails, masks, strict=True)]
    expected = fve(evaluated.column("activations"), torch.cat(read), lens.mean)
    assert found["context_tail"]["fve"][1] == pytest.approx(float(expected), abs=1e-5)


def test_a_text_that_stops_is_read_up_to_there(lens, evaluated, monkeypatch):
    ids = evaluated.text_ids.clone()
    monkeypatch.setattr(lens.config.decoder, "stop_token_id", 2)
    ids[:, -1] = 2
    stopped = text_length(EvaluatedRows(lens, evaluated.batches, ids), num_bootstrap=10, seed=0)
    for part in ("first", "last"):
        values = stopped[part]["fve"]
        assert values[-1] == pytest.approx(values[-2]) and values[-2] != pytest.approx(values[-3])


def test_the_mask_keeps_from_either_end():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()
    assert first_kept(mask, 2).tolist() == torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool().tolist()
    assert last_kept(mask, 2).tolist() == torch.tensor([[0, 0, 1, 0, 1], [1, 0, 0, 0, 0]]).bool().tolist()


def test_the_whole_text_is_what_the_evaluation_has_and_intervals_surround_it(found):
    assert found["first"]["fve"][-1] == pytest.approx(found["last"]["fve"][-1])
    for part in PARTS:
        for metric in ("fve", "kl_recovered"):
            for value, (low, high) in zip(found[part][metric], found[part][f"{metric}_ci95"], strict=True):
                assert low < value < high
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("tokens", "lengths"), [(1, [1]), (5, [1, 2, 3, 4, 5]), (8, list(range(1, 9))), (20, [1, 2, 4, 8, 16, 20])]
)
def test_lengths(tokens, lengths):
    assert text_lengths(tokens) == lengths


def test_does_not_depend_on_the_batch_size(lens, found):
    together = text_length(evaluated_rows(lens, batch_size=10), num_bootstrap=100, seed=0)
    for part in PARTS:
        for name, values in found[part].items():
            torch.testing.assert_close(torch.tensor(together[part][name]), torch.tensor(values), atol=1e-4, rtol=1e-4)


def test_a_reconstruction_that_is_not_finite_is_an_error(lens, evaluated, monkeypatch):
    broken = torch.full((4, WIDTH), float("nan"))
    monkeypatch.setattr(lens, "read_ids", lambda ids, mask=None: broken[: len(ids)])
    with pytest.raises(ValueError, match="the KL of shorter texts hold NaN or infinity"):
        text_length(evaluated, num_bootstrap=10, seed=0)
