"""`direction` and `steer`: the step against one taken by hand, how it prints, bad input."""

import pytest
import torch
import torch.nn.functional as F
from tiny_lenses import LAYER, PROMPTS, disturb, tiny_lens

from consistency_lens import ConsistencyLensModel

PROMPT, IDS = "w9 w10 w11 w12 w13", [1, 9, 10, 11, 12, 13]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lens(request) -> ConsistencyLensModel:
    return disturb(tiny_lens(request.param, **PROMPTS))


def with_last_word(words: str) -> str:
    return " ".join([*words.split()[:-1], "w42"])


class TestDirection:
    def test_is_the_difference_of_the_reconstructions(self, lens):
        expected = lens.encode("w9 w10 w12 w13") - lens.encode("w9 w10")
        torch.testing.assert_close(lens.direction("w9 w10", "w9 w10 w12 w13"), expected[0])
        assert expected.norm() > 0.1

    def test_there_and_back_is_nowhere(self, lens):
        assert torch.equal(lens.direction("w9 w10", "w11"), -lens.direction("w11", "w9 w10"))

    def test_dropout_has_no_part_in_it(self):
        lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5}
        lens = disturb(tiny_lens("llama", "lora", lora=lora), scale=0.3)
        expected = lens.direction("w9 w10", "w11")
        lens.train()
        assert torch.equal(lens.direction("w9 w10", "w11"), expected)
        assert lens.encoder.training


class TestSteer:
    @pytest.mark.parametrize("position, index", [(-1, 5), (2, 2), (0, 0), (-6, 0)])
    @pytest.mark.parametrize("scale", [1.0, -0.5])
    def test_equals_a_replacement_by_hand(self, lens, position, index, scale):
        steering = lens.steer(PROMPT, with_last_word, position, scale)
        stream, ids = lens.subject.stream, torch.tensor([IDS])
        with torch.no_grad():
            with stream.capture(LAYER) as captured:
                before = lens.subject.model(ids).logits[0, index].log_softmax(-1)
            activation = captured.activations[0, index]
            words = lens.decode(activation).texts[0]
            step = scale * (lens.encode(with_last_word(words)) - lens.encode(words))[0]
            with stream.replace(LAYER, torch.tensor([[index]]), (activation + step)[None, None]):
                after = lens.subject.model(ids).logits[0, index].log_softmax(-1)
        assert (steering.position, steering.token) == (index, lens.tokenizer.decode([IDS[index]]))
        assert (steering.explanation, steering.edited) == (words, with_last_word(words))
        torch.testing.assert_close(steering.activation, activation)
        torch.testing.assert_close(steering.direction, step)
        kl = F.kl_div(after, before, reduction="sum", log_target=True).item()
        assert kl > 1e-3
        assert steering.kl == pytest.approx(kl, abs=1e-4)
        for top, expected in ((steering.top_before, before), (steering.top_after, after)):
            probabilities, tokens = expected.exp().topk(3)
            assert [token for token, _ in top] == lens.tokenizer.convert_ids_to_tokens(tokens.tolist())
            assert [probability for _, probability in top] == pytest.approx(probabilities.tolist(), abs=1e-4)

    def test_an_edit_may_be_the_text_itself(self, lens):
        words = lens.steer(PROMPT, "w42").explanation
        by_text, by_function = lens.steer(PROMPT, with_last_word(words)), lens.steer(PROMPT, with_last_word)
        assert by_text.edited == by_function.edited
        assert torch.equal(by_text.direction, by_function.direction)

    def test_without_a_step_nothing_changes(self, lens):
        steering = lens.steer(PROMPT, "w42", scale=0.0)
        assert not steering.direction.any()
        assert steering.kl == pytest.approx(0, abs=1e-5)
        assert [token for token, _ in steering.top_after] == [token for token, _ in steering.top_before]

    def test_reads_what_explain_reads(self, lens):
        steering, explained = lens.steer(PROMPT, "w42", position=3), lens.explain(PROMPT, positions=[3])[0]
        assert (steering.explanation, steering.token) == (explained.text, explained.token)
        assert [token for token, _ in steering.top_before] == [token for token, _ in explained.top_before]


class TestPrinting:
    def test_shows_the_words_and_the_predictions_before_and_after(self, lens):
        steering = lens.steer(PROMPT, "w42 w43")
        text = str(steering)
        assert f"token 'w13' at position 5; KL {steering.kl:.2f} nats" in text
        before, after = (next(line for line in text.splitlines() if name in line) for name in ("before", "after"))
        assert steering.explanation in before and steering.top_before[0][0] in before
        assert "w42 w43" in after and steering.top_after[0][0] in after

    def test_brackets_are_no_markup(self, lens):
        steering = lens.steer(PROMPT, "w42 [bold]x[/nothing]")
        assert "w42 [bold]x[/nothing]" in str(type(steering)(**{**vars(steering), "token": "[/red]"}))


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"edit": " "}, "must be a text of at least one word, got ' '"),
            ({"edit": lambda words: None}, "must be a text of at least one word, got None"),
            ({"edit": lambda words: words}, "the edit leaves the explanation as it is"),
            ({"position": 6}, r"position 6 lies outside the prompt's 0\.\.5"),
            ({"position": -7}, r"position -7 lies outside the prompt's 0\.\.5"),
            ({"position": 0.5}, r"steer: a position must be a whole number, got 0\.5"),
            ({"scale": float("nan")}, "scale must be a finite number, got nan"),
            ({"prompt": ""}, "got an empty text"),
        ],
    )
    def test_are_one_line(self, lens, arguments, message):
        with pytest.raises(ValueError, match=message) as error:
            lens.steer(**{"prompt": PROMPT, "edit": "w42", **arguments})
        assert "\n" not in str(error.value)
