import itertools

import pytest
import torch
from lens_runs import tiny_cache, tiny_lens

from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.data.collator import ActivationCollator
from consistency_lens.losses import group_advantage, kl_divergence, normalised_mse
from consistency_lens.modeling_consistency_lens import LensOutput
from consistency_lens.straight_through import fold_in, sample_tokens
from consistency_lens.token_logits import TokenLogits
from consistency_lens.training.lm_reference import DecoderReference, SubjectReference, freeze_copy
from consistency_lens.training.objectives import (
    Gumbel,
    PolicyGradient,
    Step,
    WarmStart,
    functional_kl,
    uniform,
)
from consistency_lens.training.tails import Tails


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    subject, tokenizer, cache = tiny_cache(tmp_path_factory.mktemp("cache"))
    rows = ActivationRows(cache, pair_seed=0)
    batch = ActivationCollator(0, 3, bos_token_id=1)([rows[i] for i in range(8)])
    return subject, tiny_lens(subject, tokenizer, cache), batch


def spied(lens, seen):
    """The lens as a model that keeps what it is called with."""

    def model(**inputs):
        seen.append(inputs)
        return lens(**inputs)

    return model


def test_warm_start_reads_own_texts_in_the_rows_that_their_keys_name(setting):
    _, lens, batch = setting
    objective, step, seen = WarmStart(own_share=0.5), Step(seed=0, number=3), []
    losses = objective(spied(lens, seen), lens, batch, step)
    own = uniform(step.keys(batch["rows"]), 1) < 0.5
    assert 0 < own.sum() < len(own)
    read = seen[0]["encoder_text_ids"]
    assert torch.equal(read[~own], batch["tail_ids"][~own])
    drawn = lens.decode_ids(batch["activations"], keys=step.keys(batch["rows"]))
    assert torch.equal(read[own], drawn[own]) and not torch.equal(read[own], batch["tail_ids"][own])
    mse = normalised_mse(batch["activations"], lens(**seen[0] | {"reader": None}).reconstruction, lens.rms)
    torch.testing.assert_close(losses.metrics["mse_true_text"], mse[~own].mean())
    torch.testing.assert_close(losses.metrics["mse_own_text"], mse[own].mean())
    half = {name: tensor[4:] for name, tensor in batch.items()}
    objective(spied(lens, seen), lens, half, step)
    assert torch.equal(seen[1]["encoder_text_ids"], read[4:])  # a row reads the same text in any batch


def test_every_slice_of_a_batch_decodes_a_row():
    own = torch.tensor([False, False, False, True, False])
    chosen = [rows.nonzero().flatten().tolist() for rows in WarmStart(chunk_size=2).rows_to_decode(own)]
    assert chosen == [[0], [3], [4]]
    assert [rows.tolist() for rows in WarmStart().rows_to_decode(own)] == [own.tolist()]


def test_warm_start_with_shorter_tails_reads_the_last_tokens_of_each_length(setting):
    _, lens, batch = setting
    seen, lengths = [], []
    for number in range(8):
        WarmStart(shorter_share=1.0)(spied(lens, seen), lens, batch, Step(0, number))
        mask = seen[-1]["encoder_text_mask"]
        assert torch.equal(seen[-1]["text_ids"], batch["tail_ids"])  # a decoder without a stop token predicts them all
        assert mask[:, -1].all() and (mask.int().diff(dim=1) >= 0).all()
        lengths += mask.sum(dim=1).tolist()
    assert set(lengths) == {1, 2, 3} and max(lengths.count(n) for n in (1, 2, 3)) < len(lengths) / 2


def test_whether_a_text_is_shorter_how_short_and_whose_it_is_do_not_hang_together(setting):
    _, lens, batch = setting
    seen = []
    many = {name: torch.cat([tensor] * 40) for name, tensor in batch.items()} | {"rows": torch.arange(320)}
    WarmStart(own_share=0.5, shorter_share=0.5)(spied(lens, seen), lens, many, Step(0, 0))
    own = (seen[0]["encoder_text_ids"] != many["tail_ids"]).any(dim=1)
    lengths = seen[0]["encoder_text_mask"].sum(dim=1)
    # of three lengths each is a third of the shorter texts, so 1 and 2 are a sixth of all
    for length in (1, 2):
        assert (lengths == length).float().mean() == pytest.approx(1 / 6, abs=0.06)
        assert own[lengths == length].float().mean() == pytest.approx(1 / 2, abs=0.15)


def test_only_the_tokens_of_a_tail_are_predicted(setting):
    _, lens, batch = setting
    available = [1, 2, 3, 3, 3, 3, 3, 3]
    mask = torch.arange(3) >= 3 - torch.tensor(available)[:, None]
    short = {**batch, "tail_mask": mask}
    ids = Tails.of(short, torch.full((8,), 3), stop_token_id=None).ids
    log_p = lens.decoder(batch["activations"], ids).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    expected = torch.stack([-row[:count].mean() for row, count in zip(log_p, available, strict=True)]).mean()
    torch.testing.assert_close(WarmStart()(lens, lens, short, Step(0, 0)).terms["ce"], expected)


def test_a_given_text_is_never_cut(setting):
    _, lens, batch = setting
    seen = []
    given = {**batch, "given_text": torch.tensor([True] * 4 + [False] * 4)}
    for number in range(4):
        WarmStart(shorter_share=1.0)(spied(lens, seen), lens, given, Step(0, number))
    masks = torch.stack([inputs["encoder_text_mask"] for inputs in seen])
    assert masks[:, :4].all() and not masks[:, 4:].all()


def test_the_kl_term_is_zero_for_the_activation_itself(setting):
    subject, _, batch = setting
    assert functional_kl(subject, batch, batch["activations"][:, None]).abs().max() < 1e-5
    others = functional_kl(subject, batch, batch["other_activations"][:, None])
    assert others.min() > 1e-3
    with torch.autocast("cpu", torch.bfloat16):  # the subject judges in the precision that it was loaded in
        assert torch.equal(functional_kl(subject, batch, batch["other_activations"][:, None]), others)


def test_an_entropy_without_weight_is_measured_and_has_no_gradient(setting):
    subject, lens, batch = setting
    with_weight, without = (
        Gumbel(subject, None, needs_entropy=needs)(lens, lens, batch, Step(0, 1)) for needs in (True, False)
    )
    assert with_weight.terms["entropy"].requires_grad and "entropy" not in without.terms
    assert torch.equal(without.metrics["entropy"], with_weight.terms["entropy"])
    assert not without.metrics["entropy"].requires_grad


def test_the_subject_as_reference_reads_the_text_after_bos(setting):
    subject, _, batch = setting
    ids = batch["tail_ids"]
    logits = SubjectReference(subject)(batch["activations"], ids).states.unflatten(0, ids.shape)
    whole = subject.model(input_ids=torch.cat([torch.ones_like(ids[:, :1]), ids], dim=1)).logits
    torch.testing.assert_close(logits, whole[:, :-1], atol=1e-5, rtol=1e-4)


def test_a_frozen_copy_stays_while_the_decoder_trains(setting):
    _, lens, batch = setting
    reference = freeze_copy(lens.decoder)
    logits = reference(batch["activations"], batch["tail_ids"])
    with torch.no_grad():
        lens.decoder.projection.bias.add_(1.0)
    after = kl_divergence(lens.decoder(batch["activations"], batch["tail_ids"]), logits)
    assert torch.equal(reference(batch["activations"], batch["tail_ids"]), logits) and after.max() > 1e-4
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    with torch.no_grad():
        lens.decoder.projection.bias.sub_(1.0)


class Toy(torch.nn.Module):
    """A lens over words that are one-hot vectors: logits by position from the activation, and the first token's
    one-hot as reconstruction (of `words` of them, scaled)."""

    def __init__(self, words: int, length: int = 1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(length, words, words))
        self.words, self.length, self.rms = words, length, 1.0
        self.forced: torch.Tensor | None = None

    def logits(self, activations):
        return torch.einsum("bw,lwv->blv", activations, self.weight)

    def decode_ids(self, activations, keys=None, chunk_size=0):
        if self.forced is not None:
            return self.forced
        flat = self.logits(activations).flatten(0, 1).detach()
        each = torch.stack([fold_in(keys, t) for t in range(self.length)], dim=1).flatten()
        return sample_tokens(flat, each).view(-1, self.length)

    def text_mask(self, ids):
        return torch.ones_like(ids, dtype=torch.bool)

    drawn_mask = text_mask

    def forward(self, activations, text_ids, reader=None, **settings):
        reconstruction = torch.nn.functional.one_hot(text_ids[:, -1], self.words).float() * self.scale(text_ids)
        if reader is None:
            return LensOutput(reconstruction, text_ids)
        values = TokenLogits(self.logits(activations).flatten(0, 1)).read(reader(activations, text_ids))
        return LensOutput(reconstruction, text_ids, None, {name: v.view(text_ids.shape) for name, v in values.items()})

    def scale(self, text_ids):
        """A factor that makes the reward depend on every token."""
        return 1.0 - 0.3 * text_ids[:, :-1].float().sum(dim=1, keepdim=True)


def test_policy_gradient_finds_the_word_of_every_one_hot_activation():
    words, toy = 16, Toy(16)
    objective = PolicyGradient(reference=None, group_size=8)
    optimizer = torch.optim.Adam(toy.parameters(), lr=0.1)
    batch = {"activations": torch.eye(words), "rows": torch.arange(words)}
    for number in range(150):
        optimizer.zero_grad()
        objective(toy, toy, batch, Step(0, number)).terms["policy"].backward()
        optimizer.step()
    # the expected reward is -2/words times the chance of a wrong word; its optimum is 0, a guess gets -2/words
    right = toy.logits(torch.eye(words))[:, 0].softmax(-1).diagonal()
    assert right.mean() > 0.95


def test_the_expected_gradient_is_that_of_the_expected_reward():
    """By enumeration of all groups of two texts of two tokens over two words; centring on the group's own mean
    leaves (G - 1) / G of the gradient."""
    torch.manual_seed(0)
    words, length, group_size = 2, 2, 2
    toy = Toy(words, length).double()
    torch.nn.init.normal_(toy.weight)
    batch = {"activations": torch.eye(words)[:1].double(), "rows": torch.arange(1)}
    texts = [torch.tensor(text) for text in itertools.product(range(words), repeat=length)]

    def log_probability(text):
        return toy.logits(batch["activations"])[0].log_softmax(-1).gather(-1, text[:, None]).sum()

    def reward(text):
        return -((batch["activations"] - toy(batch["activations"], text[None]).reconstruction) ** 2).mean()

    expected_reward = sum(log_probability(text).exp() * reward(text) for text in texts)
    (analytic,) = torch.autograd.grad(expected_reward, toy.weight)
    objective = PolicyGradient(reference=None, group_size=group_size, scale_advantage=False)
    found = torch.zeros_like(analytic)
    for group in itertools.product(texts, repeat=group_size):
        toy.forced = torch.stack(group)
        chance = sum(log_probability(text) for text in group).exp().detach()
        loss = objective(toy, toy, batch, Step(0, 0)).terms["policy"]
        found -= chance * torch.autograd.grad(loss, toy.weight)[0]
    assert analytic.abs().max() > 1e-3
    # the term divides a text's log-probability by T
    torch.testing.assert_close(found * length * group_size / (group_size - 1), analytic, atol=1e-6, rtol=1e-4)


def test_the_direction_of_the_lm_term_is_that_asked_for(setting):
    _, lens, batch = setting
    reference = freeze_copy(lens.decoder)
    with torch.no_grad():
        reference.projection.bias.add_(0.5)
    step, activations = Step(0, 0), batch["activations"].repeat_interleave(2, dim=0)
    ids = lens.decode_ids(activations, keys=torch.stack([step.keys(batch["rows"], d) for d in (0, 1)], 1).flatten())
    own, other = lens.decoder(activations, ids), reference(activations, ids)
    for direction, pair in (("reverse", (own, other)), ("forward", (other, own))):
        terms = PolicyGradient(DecoderReference(reference), 2, lm_direction=direction)(lens, lens, batch, step).terms
        torch.testing.assert_close(terms["lm"], kl_divergence(*pair).mean(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reward", ["-mse", "-log_mse", "-kl"])
def test_the_policy_term_is_the_score_function_of_the_samples(setting, reward):
    """Its gradient is -mean(advantage x grad log p(text)), with rewards that carry no gradient."""
    subject, lens, batch = setting
    step, group_size = Step(0, 1), 4
    objective = PolicyGradient(reference=None, group_size=group_size, reward=reward, subject=subject)
    losses = objective(lens, lens, batch, step)
    (got,) = torch.autograd.grad(losses.terms["policy"], lens.decoder.projection.bias)

    activations = batch["activations"].repeat_interleave(group_size, dim=0)
    keys = torch.stack([step.keys(batch["rows"], draw) for draw in range(group_size)], dim=1).flatten()
    ids = lens.decode_ids(activations, keys=keys)
    log_p = lens.decoder(activations, ids).log_softmax(-1).gather(-1, ids[..., None])[..., 0].mean(1)
    error = ((activations - lens.encode(ids)) / lens.rms).square().mean(1)
    if reward == "-kl":
        whole = {name: tensor.repeat_interleave(group_size, dim=0) for name, tensor in batch.items()}
        error = functional_kl(subject, whole, lens.encode(ids)[:, None])[:, 0]
    error = error.log() if reward == "-log_mse" else error
    expected_loss = -(group_advantage(-error, group_size) * log_p).mean()
    (expected,) = torch.autograd.grad(expected_loss, lens.decoder.projection.bias)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(losses.metrics["reward"], -error.mean(), atol=1e-5, rtol=1e-5)
    assert got.abs().max() > 0


def test_equal_texts_have_no_advantage_and_move_nothing(setting):
    _, lens, batch = setting

    class Silent:  # every sample of an activation is the same text
        text_mask, drawn_mask, rms = lens.text_mask, lens.drawn_mask, lens.rms

        def decode_ids(self, activations, keys, chunk_size):
            return torch.full((len(activations), 3), 5)

    losses = PolicyGradient(reference=None, group_size=2)(lens, Silent(), batch, Step(0, 0))
    assert losses.metrics["zero_advantage_share"] == 1 and losses.terms["policy"] == 0
    (gradient,) = torch.autograd.grad(losses.terms["policy"], lens.decoder.projection.bias)
    assert not gradient.any()


def test_prefix_budgets_are_one_for_each_group_and_credit_no_unread_token(setting):
    _, lens, batch = setting
    seen, lengths = [], []
    for number in range(6):
        step = Step(0, number)
        objective = PolicyGradient(reference=None, group_size=2, prefix_budgets=True)
        losses = objective(spied(lens, seen), lens, batch, step)
        mask = seen[-1]["encoder_text_mask"]
        assert mask[:, 0].all() and (mask.int().diff(dim=1) <= 0).all() and torch.equal(mask[::2], mask[1::2])
        lengths += mask[::2].sum(dim=1).tolist()
        output = lens(**seen[-1] | {"reader": None})
        log_p = output.logits.log_softmax(-1).gather(-1, seen[-1]["text_ids"][..., None])[..., 0]
        error = ((batch["activations"].repeat_interleave(2, 0) - output.reconstruction) / lens.rms).square().mean(1)
        expected = -(group_advantage(-error, 2) * (log_p * mask).mean(1)).mean()
        torch.testing.assert_close(losses.terms["policy"], expected, atol=1e-5, rtol=1e-4)
    assert set(lengths) == {1, 2, 3}


def test_a_length_penalty_rewards_the_text_that_stops_first(setting):
    _, lens, batch = setting
    ids = torch.tensor([[5, 5, 5], [5, 2, 7]])

    class Stopping:
        rms = lens.rms

        def decode_ids(self, activations, keys, chunk_size):
            return ids.repeat(len(activations) // 2, 1)

        def text_mask(self, ids):
            return (ids == 2).cumsum(1) == 0

        def drawn_mask(self, ids):
            return (ids == 2).cumsum(1) - (ids == 2).long() == 0

    def losses_with(penalty):
        objective = PolicyGradient(reference=None, group_size=2, length_penalty=penalty, scale_advantage=False)
        objective.rewards = lambda batch, reconstruction, mse: torch.zeros(2 * len(batch["rows"]))
        return objective(lens, Stopping(), batch, Step(0, 0))

    free, taxed = losses_with(0.0), losses_with(0.3)
    assert free.terms["policy"] == 0 and taxed.metrics["text_length"] == 2
    # rewards -0.3 and -0.1 about their mean, and of the short text only its word and its stop are scored
    log_p = lens.decoder(batch["activations"].repeat_interleave(2, 0), ids.repeat(8, 1)).log_softmax(-1)
    log_p = log_p.gather(-1, ids.repeat(8, 1)[..., None])[..., 0]
    score = torch.stack([log_p[::2].sum(1) / 3, log_p[1::2, :2].sum(1) / 3])
    torch.testing.assert_close(taxed.terms["policy"], (0.1 * score[0] - 0.1 * score[1]).mean() / 2)


def test_both_estimators_of_the_lm_term_agree_in_the_mean(setting):
    _, lens, batch = setting
    reference = DecoderReference(freeze_copy(lens.decoder))
    with torch.no_grad():
        reference.decoder.projection.bias.add_(0.5)
    values = {
        estimator: torch.stack(
            [
                PolicyGradient(reference, 4, lm_estimator=estimator)(lens, lens, batch, Step(0, number)).terms["lm"]
                for number in range(40)
            ]
        ).detach()
        for estimator in ("exact", "k3")
    }
    assert values["exact"].mean() > 1e-3
    difference = values["k3"] - values["exact"]
    assert difference.std() > 0 and difference.mean().abs() < 4 * difference.std() / 40**0.5


def test_straight_through_lets_the_error_reach_the_decoder(setting):
    _, lens, batch = setting
    for straight_through in (False, True):
        objective = PolicyGradient(reference=None, group_size=2, straight_through=straight_through)
        gradients = []
        for tau in (0.5, 1.0):
            mse = objective(lens, lens, batch, Step(0, 0, tau)).terms["mse"]
            gradients += torch.autograd.grad(mse, lens.decoder.projection.bias, materialize_grads=True)
        assert [bool(gradient.any()) for gradient in gradients] == [straight_through] * 2
        assert torch.equal(*gradients) != straight_through


def test_samples_of_one_activation_differ_and_belong_to_their_row(setting):
    _, lens, batch = setting
    step = Step(0, 1)
    texts = [lens.decode_ids(batch["activations"], keys=step.keys(batch["rows"], draw)) for draw in range(3)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(texts, 2))
    alone = lens.decode_ids(batch["activations"][2:3], keys=step.keys(batch["rows"][2:3], 1))
    assert torch.equal(alone[0], texts[1][2])
