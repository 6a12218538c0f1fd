import json

import pytest
import torch
from checked_rows import LENGTHS, evaluated_rows
from tiny_lenses import PROMPTS, disturb, tiny_lens

from consistency_lens.evaluation.ablation import ablation, split_sentences, split_words, without_each, word_importance
from consistency_lens.evaluation.metrics import fve
from consistency_lens.losses import kl_divergence


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lens(request):
    return disturb(tiny_lens(request.param, **PROMPTS))


@pytest.fixture(scope="module")
def evaluated(lens):
    return evaluated_rows(lens)


@pytest.fixture(scope="module")
def result(evaluated):
    return ablation(evaluated, seed=0, rows=10)


class TestWordImportance:
    def test_is_the_fall_of_the_fve_of_one_activation(self, lens):
        activation = 1.5 * torch.randn(len(lens.mean), generator=torch.Generator().manual_seed(1))
        importance = word_importance(lens, activation, "w9 w10 w11")
        assert [word for word, _ in importance] == ["w9", "w10", "w11"]
        texts = ("w9 w10 w11", "w10 w11", "w9 w11", "w9 w10")
        whole, *rests = (float(fve(activation[None], lens.encode(text), lens.mean)) for text in texts)
        assert [drop for _, drop in importance] == pytest.approx([whole - rest for rest in rests], abs=1e-4)

    @pytest.mark.parametrize("text", ["", "w9", " w9\n"])
    def test_fewer_than_two_words_are_an_error(self, lens, text):
        with pytest.raises(ValueError, match="must have at least two words, got"):
            word_importance(lens, lens.mean, text)


class TestSplitting:
    @pytest.mark.parametrize("text", ["a bc  d", " a b\n", "\n\na", "", "  "])
    def test_words_joined_are_the_text(self, text):
        words = split_words(text)
        assert [word.strip() for word in words] == text.split()
        assert "".join(words) == (text if text.strip() else "")

    @pytest.mark.parametrize(
        "text, sentences",
        [
            ("named Lily. She had 3.5 cats", ["named Lily.", " She had 3.5 cats"]),
            ('He said, "Hi!" Then he left? Yes.\n', ['He said, "Hi!"', " Then he left?", " Yes.\n"]),
            ("no end", ["no end"]),
            ("", []),
        ],
    )
    def test_sentences_end_at_marks(self, text, sentences):
        assert split_sentences(text) == sentences

    def test_what_is_left_begins_as_the_text_does(self):
        assert without_each(split_words("a b c")) == ["b c", "a c", "a b"]
        assert without_each(split_words(" a\nb c")) == [" b c", " a c", " a\nb"]
        assert without_each(["a"]) == without_each([]) == []


class TestOnALens:
    def test_drops_are_those_of_single_texts(self, lens, evaluated):
        result = ablation(evaluated_rows(lens, 12, 9), seed=0, rows=2)
        activations = evaluated_rows(lens, 12, 9).column("activations")
        variances = (activations.double() - lens.mean.double()).square().sum(-1)
        drops = []
        for activation, variance, text in zip(activations, variances, lens.decode(activations).texts, strict=True):
            drops += [drop * float(variance / variances.mean()) for _, drop in word_importance(lens, activation, text)]
        assert result["words"]["mean_drop"] == pytest.approx(sum(drops) / len(drops), abs=1e-4)
        assert result["words"]["drop_from_end"] == pytest.approx(
            [(drops[index] + drops[index + 4]) / 2 for index in (3, 2, 1, 0)], abs=1e-4
        )

    def test_kl_increases_are_those_of_full_passes(self, lens):
        evaluated = evaluated_rows(lens, 12)
        result = ablation(evaluated, seed=0, rows=1)
        batch, subject = evaluated.batches[0], lens.subject
        text = lens.decode(batch["activations"]).texts[0]
        context = subject.context(batch["input_ids"], batch["attention_mask"], batch["positions"][:, None])
        with torch.no_grad():
            whole, *rests = (
                float(kl_divergence(context.logits, subject.replaced_logits_full(context, lens.encode(t)[None])))
                for t in (text, *without_each(split_words(text)))
            )
        assert result["words"]["mean_kl_increase"] == pytest.approx(sum(rests) / len(rests) - whole, abs=1e-4)

    def test_drops_are_measured_from_the_retokenised_texts(self, lens, evaluated, result):
        activations = evaluated.column("activations")
        again = lens.encode(lens.decode(activations).texts)
        assert result["retokenised"]["fve"] == pytest.approx(float(fve(activations, again, lens.mean)), abs=1e-4)

    def test_does_not_depend_on_the_batch_size(self, lens, evaluated):
        chosen = ablation(evaluated, seed=1, rows=4)
        again = ablation(evaluated_rows(lens, batch_size=10), seed=1, rows=4)
        assert chosen["rows"] == again["rows"] == 4
        assert again["retokenised"]["fve"] == pytest.approx(chosen["retokenised"]["fve"], abs=1e-4)
        assert again["words"]["drop_from_end"] == pytest.approx(chosen["words"]["drop_from_end"], abs=1e-4)

    def test_rows_are_a_random_choice(self, evaluated):
        first, again, other = (ablation(evaluated, seed, rows=3) for seed in (0, 0, 1))
        assert first == again
        assert first["retokenised"] != other["retokenised"]

    def test_leaves_the_random_state_alone_and_is_json(self, evaluated):
        state = torch.random.get_rng_state()
        json.dumps(ablation(evaluated, seed=0, rows=2), allow_nan=False)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_no_rows_are_an_error(self, evaluated):
        with pytest.raises(ValueError, match="ablation: rows must be at least 1, got 0"):
            ablation(evaluated, seed=0, rows=0)


class TestOnKnownTexts:
    """The encoder is one that reconstructs A of every row if its text names it, and the mean if it does not."""

    @pytest.fixture
    def known(self, evaluated, monkeypatch):
        def check(texts, key="key"):
            lens, count = evaluated.lens, len(LENGTHS)
            activations = dict(zip(range(count), evaluated.column("activations"), strict=True))
            written = [f"{text} #{row}" if text else "" for row, text in enumerate(texts)]
            monkeypatch.setattr(lens.tokenizer, "batch_decode", lambda ids: written)
            order = iter(range(count))

            def encode(texts):
                # Called once a row, in order; the first text is the whole one.
                activation = activations[next(order)]
                return torch.stack([activation if key in text.split() else lens.mean for text in texts])

            monkeypatch.setattr(lens, "encode", encode)
            return ablation(evaluated, seed=0, rows=count)

        return check

    def test_the_word_that_carries_everything_is_found(self, known):
        result = known(["a key b"] * len(LENGTHS))
        words = result["words"]
        assert result["retokenised"]["fve"] == pytest.approx(1)
        assert words["mean_top_drop"] == pytest.approx(1)
        assert words["top_share"] == pytest.approx(1)
        assert words["greatest"][0] == {"word": "key", "count": 10, "mean_drop": pytest.approx(1)}
        assert words["mean_kl_increase"] > 0
        # "#<row>" is the last word of each text, and of no two the same.
        assert words["drop_from_end"] == pytest.approx([0, 0, 1, 0])
        assert {entry["word"] for entry in words["greatest"]} == {"key", "a", "b"}

    def test_the_drops_of_words_sum_to_their_mean_times_their_count(self, known):
        words = known(["key b", "a key b c"] * 5)["words"]
        assert words["count"] == 10 * 4
        assert words["count_from_end"] == [10, 10, 10, 5, 5]
        total = sum(d * n for d, n in zip(words["drop_from_end"], words["count_from_end"], strict=True))
        assert total == pytest.approx(words["mean_drop"] * words["count"])
        assert total == pytest.approx(words["mean_top_drop"] * 10)

    def test_a_word_said_twice_carries_nothing_alone(self, known):
        words = known(["key a key"] * len(LENGTHS))["words"]
        assert words["mean_top_drop"] == words["top_share"] == 0

    def test_a_word_that_does_harm_has_a_negative_drop(self, evaluated, monkeypatch):
        lens = evaluated.lens
        monkeypatch.setattr(lens.tokenizer, "batch_decode", lambda ids: ["bad word"] * len(ids))
        monkeypatch.setattr(
            lens, "encode", lambda texts: torch.stack([lens.mean + (10 if "bad" in text else 0) for text in texts])
        )
        words = ablation(evaluated, seed=0, rows=10)["words"]
        assert [entry["word"] for entry in words["greatest"]] == ["word", "bad"]
        assert words["greatest"][1]["mean_drop"] < -1
        assert words["top_share"] == 0

    def test_texts_that_every_word_harms_do_not_lower_the_share_of_the_top_words(self, lens, monkeypatch):
        evaluated = evaluated_rows(lens, 12, 9)
        written = iter([evaluated.column("activations")[0], lens.mean + 10])
        monkeypatch.setattr(lens.tokenizer, "batch_decode", lambda ids: ["key a", "bad worse"])

        def encode(texts):
            step = next(written) - lens.mean
            read = torch.tensor([[sum(word in text.split() for word in ("key", "bad", "worse"))] for text in texts])
            return lens.mean + read * step

        monkeypatch.setattr(lens, "encode", encode)
        words = ablation(evaluated, seed=0, rows=2)["words"]
        assert words["mean_top_drop"] < -1
        assert words["top_share"] == pytest.approx(1)

    def test_sentences_are_left_out_whole(self, known):
        sentences = known(["a b. key c! d"] * 4 + ["key a"] * 6)["sentences"]
        assert sentences["count"] == 3 * 4
        # Rows differ in variance, so the third that carries everything is worth a third on average only nearly.
        assert 0.1 < sentences["mean_drop"] < 0.8
        assert sentences["mean_kl_increase"] > 0

    def test_texts_of_one_word_have_nothing_to_leave_out(self, evaluated, monkeypatch):
        monkeypatch.setattr(evaluated.lens.tokenizer, "batch_decode", lambda ids: ["w9"] * len(ids))
        result = ablation(evaluated, seed=0, rows=10)
        assert result["rows"] == 10
        assert result["words"] == {
            "count": 0, "mean_drop": 0, "mean_kl_increase": 0, "mean_top_drop": 0, "top_share": 0,
            "drop_from_end": [], "count_from_end": [], "greatest": [],
        }  # fmt: skip
        assert result["sentences"] == {"count": 0, "mean_drop": 0, "mean_kl_increase": 0}


def test_texts_end_at_the_stop_token():
    lens = disturb(tiny_lens(**PROMPTS, stop_token_id=2))
    evaluated = evaluated_rows(lens, 12, 9)
    evaluated.text_ids[:] = torch.tensor([[9, 10, 2, 11], [9, 10, 11, 12]])
    assert ablation(evaluated, seed=0, rows=2)["words"]["count"] == 2 + 4
