import pytest
import torch
from evaluation_rows import tiny_collator, tiny_rows
from tiny_lenses import LAYER, NUM_TEXT_TOKENS, disturb, tiny_lens
from tiny_models import VOCAB_SIZE

from consistency_lens.evaluation import private_code as module
from consistency_lens.evaluation.controls import read_ids
from consistency_lens.evaluation.evaluated import EvaluatedRows, training_sample
from consistency_lens.evaluation.metrics import fve
from consistency_lens.evaluation.private_code import private_code, recovered, shuffled_words, train_fresh_encoder

# Contexts are a little longer than T and a BOS: their ends say much of the activation, but not all.
NUM_ROWS, NUM_HELD_OUT = 400, 60
STEPS, LEARNING_RATE = 40, 3e-3


def standard_lens(**settings):
    """A lens with the statistics of the rows, and those rows: for training, and held out."""
    lens = tiny_lens(**settings)
    rows = tiny_rows(lens.subject, *([6, 7, 8] * NUM_ROWS)[:NUM_ROWS])
    activations = training_sample(rows, tiny_collator(), NUM_ROWS, seed=0)["activations"]
    mean = activations.mean(0)
    lens.set_statistics(mean, (activations - mean).square().mean().sqrt())
    return lens, rows[NUM_HELD_OUT:], rows[:NUM_HELD_OUT]


def evaluated_rows(lens, rows, code=None, batch_size=30) -> EvaluatedRows:
    """Rows whose texts are the true tails, each token replaced by its code."""
    code = torch.arange(VOCAB_SIZE) if code is None else code
    batches = [tiny_collator()(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return EvaluatedRows(lens, batches, code[torch.cat([batch["tail_ids"] for batch in batches])])


def fresh_encoder(lens, train_rows, steps=STEPS, seed=0, learning_rate=LEARNING_RATE):
    return train_fresh_encoder(lens, train_rows, tiny_collator(), steps, 64, learning_rate, seed)


@pytest.fixture(scope="module")
def quoting():
    """A lens whose encoder reads true text, with training and held-out rows."""
    lens, train_rows, rows = standard_lens(training="full")
    lens.encoder = fresh_encoder(lens, train_rows, seed=1)
    return lens, train_rows, rows


@torch.no_grad()
def check(lens, train_rows, rows, code=None, seed=0, batch_size=30):
    evaluated = evaluated_rows(lens, rows, code, batch_size)
    return private_code(evaluated, train_rows, tiny_collator(), STEPS, LEARNING_RATE, seed)


class TestPrivateCode:
    def test_a_fresh_encoder_reads_quotations_but_no_private_code(self, quoting, monkeypatch):
        lens, train_rows, rows = quoting
        open_words = check(lens, train_rows, rows)["fresh_encoder"]

        code = torch.arange(VOCAB_SIZE)
        code[3:] = 3 + torch.randperm(VOCAB_SIZE - 3, generator=torch.Generator().manual_seed(0))
        embed, meaning = lens.encoder.embed_ids, code.argsort()
        monkeypatch.setattr(lens.encoder, "embed_ids", lambda ids: embed(meaning[ids]))
        hidden_words = check(lens, train_rows, rows, code)["fresh_encoder"]

        assert open_words["fve"] > 0.2 and open_words["kl_recovered"] > 0.2
        assert open_words["share_of_fve"] > 0.7
        assert hidden_words["fve"] < 0.1 and hidden_words["share_of_fve"] < 0.3

    def test_word_shuffle_reads_the_words_in_another_order(self, quoting):
        lens, train_rows, rows = quoting
        result = check(lens, train_rows, rows)["word_shuffle"]
        evaluated = evaluated_rows(lens, rows)
        keys = module.row_keys(0, 0, evaluated.column("rows")).tolist()
        texts = lens.tokenizer.batch_decode(evaluated.text_ids)
        with torch.no_grad():
            read = lens.encode([shuffled_words(text, key) for text, key in zip(texts, keys, strict=True)])
            whole = lens.encode(texts)
        expected, unshuffled = (float(fve(evaluated.column("activations"), of, lens.mean)) for of in (read, whole))
        assert result["fve"] == pytest.approx(expected, abs=1e-4)
        assert result["share_of_fve"] == pytest.approx(expected / unshuffled, abs=1e-3)
        assert result["share_of_fve"] < 0.9  # the tiny subject's rows depend on order

    def test_word_shuffle_of_one_word_changes_nothing(self, quoting, monkeypatch):
        lens, train_rows, rows = quoting
        evaluated = evaluated_rows(lens, rows)
        one_word = EvaluatedRows(lens, evaluated.batches, evaluated.text_ids[:, -1:])
        monkeypatch.setattr(module, "train_fresh_encoder", lambda *arguments: lens.encoder)
        with torch.no_grad():
            result = private_code(one_word, train_rows, tiny_collator(), 1, 1e-3, seed=0)
        # the lens's own encoder, in the fresh one's place, reads them as they are
        assert result["word_shuffle"] == pytest.approx(result["fresh_encoder"], abs=1e-4)
        assert result["retokenised"] == pytest.approx(result["fresh_encoder"], abs=1e-4)

    def test_has_no_share_of_an_fve_that_is_not_positive(self):
        lens, train_rows, rows = standard_lens()
        lens.encoder.output_map.bias.data += 9
        result = check(lens, train_rows, rows)
        assert {of_reading["share_of_fve"] for of_reading in result.values()} == {0.0}
        assert result["fresh_encoder"]["fve"] > 0 > result["word_shuffle"]["fve"]

    def test_does_not_depend_on_the_batch_size(self, quoting):
        lens, train_rows, rows = quoting
        whole, sevens = (check(lens, train_rows, rows, batch_size=size) for size in (60, 7))
        for name in whole:
            assert sevens[name] == pytest.approx(whole[name], abs=1e-3), name

    def test_nan_is_an_error(self):
        lens, train_rows, rows = standard_lens()
        lens.encoder.output_map.bias.data[0] = float("nan")
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            check(lens, train_rows, rows)


class TestRecovered:
    def test_identity_is_1_and_the_mean_0(self, quoting):
        lens, _, rows = quoting
        with torch.no_grad():
            result = recovered(
                evaluated_rows(lens, rows),
                lambda _, batch: {
                    "identity": batch["activations"],
                    "the mean": lens.mean.expand_as(batch["activations"]),
                },
            )
        assert result["identity"] == pytest.approx({"fve": 1, "kl_recovered": 1}, abs=1e-5)
        assert result["the mean"] == pytest.approx({"fve": 0, "kl_recovered": 0}, abs=1e-5)


class TestShuffledWords:
    def test_keeps_the_words_and_the_white_space(self):
        text = "  once upon\n\na time "
        shuffled = {shuffled_words(text, key) for key in range(200)}
        assert len(shuffled) == 24
        for other in shuffled:
            assert sorted(other.split()) == sorted(text.split())
            assert [len(part) for part in (other[:2].strip(), other[-1:].strip())] == [0, 0]
            assert other.count("\n\n") == 1

    @pytest.mark.parametrize("text", ["", " ", "word", " word\n"])
    def test_there_is_nothing_to_shuffle_in_one_word(self, text):
        assert {shuffled_words(text, key) for key in range(20)} == {text}

    def test_follows_the_key(self):
        text = " ".join(f"w{index}" for index in range(12))
        assert shuffled_words(text, 5) == shuffled_words(text, 5) != shuffled_words(text, 6)


class TestFreshEncoder:
    def test_learns_to_read_true_text(self):
        lens, train_rows, rows = standard_lens(training="full")
        evaluated = evaluated_rows(lens, rows)
        activations = evaluated.column("activations")
        before = fve(activations, read_ids(lens, evaluated.text_ids).detach(), lens.mean)
        encoder = fresh_encoder(lens, train_rows)
        after = fve(activations, encoder(encoder.embed_ids(evaluated.text_ids)), lens.mean)
        assert after > before + 0.05

    def test_reads_texts_of_every_length_up_to_t(self, monkeypatch):
        lens, forward = tiny_lens(), module.LensEncoder.forward
        seen = []

        def recorded(encoder, text, mask):
            seen.append((text.shape[1], mask.sum(1).unique().tolist()))
            return forward(encoder, text, mask)

        monkeypatch.setattr(module.LensEncoder, "forward", recorded)
        # Contexts of two tokens after BOS: what is read of them stands at the end.
        fresh_encoder(lens, tiny_rows(lens.subject, *[3] * 64))
        assert sorted({length for length, _ in seen}) == list(range(1, NUM_TEXT_TOKENS + 1))
        assert all(tokens == [min(length, 2)] for length, tokens in seen)

    @pytest.mark.parametrize("training", ["frozen", "lora", "full"])
    def test_leaves_lens_subject_and_random_state_alone(self, training):
        lens, train_rows, _ = standard_lens(training=training)
        disturb(lens)
        parameters = {**dict(lens.named_parameters()), **dict(lens.subject.model.named_parameters())}
        before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in parameters.items()}
        state = torch.random.get_rng_state()
        with torch.no_grad():
            encoder = fresh_encoder(lens, train_rows, steps=4)
        assert torch.equal(torch.random.get_rng_state(), state)
        for name, tensor in parameters.items():
            assert torch.equal(tensor, before[name][0]) and tensor.requires_grad == before[name][1], name
            assert tensor.grad is None, name
        assert not encoder.training
        assert not any(p.requires_grad or p.grad is not None for p in encoder.parameters())
        shares = encoder.base.get_input_embeddings().weight is lens.subject.stream.input_embedding.weight
        assert shares == (training != "full")

    @pytest.mark.parametrize("training", ["lora", "full"])
    def test_follows_the_seed_alone(self, training):
        lens, train_rows, rows = standard_lens(training=training)
        ids = evaluated_rows(lens, rows).text_ids
        readings = []
        for seed in (0, 0, 1):
            torch.manual_seed(len(readings))
            encoder = fresh_encoder(lens, train_rows, steps=4, seed=seed)
            readings.append(encoder(encoder.embed_ids(ids)))
        assert torch.equal(readings[0], readings[1])
        assert not torch.equal(readings[0], readings[2])

    def test_owes_nothing_to_the_lens_encoder(self):
        lens, train_rows, rows = standard_lens(training="full")
        ids = evaluated_rows(lens, rows).text_ids
        readings = []
        for scale in (0, 0.5):
            encoder = fresh_encoder(disturb(lens, scale), train_rows, steps=4)
            readings.append(encoder(encoder.embed_ids(ids)))
        assert torch.equal(*readings)
        assert lens.config.layer == LAYER
