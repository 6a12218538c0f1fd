"""`explain`: positions, words, FVE, KL and predictions against full passes; how it prints; bad input."""

import pytest
import torch
import torch.nn.functional as F
from tiny_lenses import LAYER, PROMPTS, disturb, tiny_lens, tiny_tokenizer
from tiny_models import MAX_POSITIONS, tiny_model

from consistency_lens import ConsistencyLensModel, Explanation
from consistency_lens.explanation import TokenExplanation

TEXT, IDS = "w9 w10 w11 w12 w13", [1, 9, 10, 11, 12, 13]


@pytest.fixture(scope="module")
def lens() -> ConsistencyLensModel:
    return disturb(tiny_lens(**PROMPTS))


@pytest.fixture(scope="module")
def explanation(lens) -> Explanation:
    return lens.explain(TEXT)


def test_reads_every_token_after_bos(explanation):
    assert [row.position for row in explanation] == [1, 2, 3, 4, 5]
    assert [row.token for row in explanation] == TEXT.split()
    assert len(explanation) == 5 and explanation[-1].token == "w13"


def test_reads_the_positions_asked_for_in_that_order(lens, explanation):
    chosen = lens.explain(TEXT, positions=[4, -6, 2])  # of six tokens
    assert [row.token for row in chosen] == ["w12", "<s>", "w10"]
    assert chosen[0].text == explanation[3].text
    assert chosen[2].kl == pytest.approx(explanation[1].kl, abs=1e-5)


def test_without_bos_every_token_is_read():
    lens = ConsistencyLensModel.from_subject(tiny_model("llama"), tiny_tokenizer(bos=False), LAYER).eval()
    assert [row.position for row in lens.explain("w9 w10")] == [0, 1]


def test_figures_equal_those_of_full_passes(lens, explanation):
    stream, ids = lens.subject.stream, torch.tensor([IDS])
    with torch.no_grad():
        with stream.capture(LAYER) as captured:
            before = lens.subject.model(ids).logits[0].log_softmax(-1)
        for row in explanation:
            activation = captured.activations[0, row.position]
            decoded = lens.decode(activation)
            reconstruction = lens.encode(decoded.token_ids)
            assert row.text == decoded.texts[0]
            error, scale = (activation - reconstruction[0]).square().sum(), (activation - lens.mean).square().sum()
            assert row.fve == pytest.approx((1 - error / scale).item(), abs=1e-4)
            with stream.replace(LAYER, torch.tensor([[row.position]]), reconstruction[None]):
                after = lens.subject.model(ids).logits[0, row.position].log_softmax(-1)
            kl = F.kl_div(after, before[row.position], reduction="sum", log_target=True)
            assert kl > 0.01
            assert row.kl == pytest.approx(kl.item(), abs=1e-4)
            for top, expected in ((row.top_before, before[row.position]), (row.top_after, after)):
                probabilities, tokens = expected.exp().topk(3)
                assert [token for token, _ in top] == lens.tokenizer.convert_ids_to_tokens(tokens.tolist())
                assert [probability for _, probability in top] == pytest.approx(probabilities.tolist(), abs=1e-4)


def test_a_perfect_reconstruction_has_fve_one_and_no_kl(lens, monkeypatch):
    activations = lens.subject.activations(torch.tensor([IDS]), torch.ones(1, len(IDS)))[0, 1:]
    monkeypatch.setattr(lens, "encode", lambda texts: activations)
    for row in lens.explain(TEXT):
        assert row.fve == pytest.approx(1.0, abs=1e-5)
        assert row.kl == pytest.approx(0.0, abs=1e-5)
        assert [token for token, _ in row.top_before] == [token for token, _ in row.top_after]


def test_the_mean_has_fve_zero(lens, monkeypatch):
    monkeypatch.setattr(lens, "encode", lambda texts: lens.mean.expand(len(texts), -1))
    assert all(row.fve == pytest.approx(0.0, abs=1e-5) for row in lens.explain(TEXT))


def test_prints_as_a_table_with_a_line_for_each_token(explanation):
    lines = str(explanation).splitlines()
    for row in explanation:
        assert any(repr(row.token) in line and f"{row.kl:.2f}" in line for line in lines)


def test_brackets_in_a_text_are_no_markup(explanation):
    row = explanation[0]
    bracketed = type(row)(**{**vars(row), "text": "[bold]x[/nothing]"})
    assert "[bold]x[/nothing]" in str(Explanation(TEXT, [bracketed]))


def test_control_characters_reach_no_terminal():
    row = TokenExplanation(0, "\x1b", " red\x1b[31m\nnext ", 0.5, 0.1, [("\x1b", 0.5), ("\r", 0.4)], [("\x9b", 0.5)])
    printed = str(Explanation("text", [row]))
    assert all(character.isprintable() or character == "\n" for character in printed)
    assert "red\\x1b[31m⏎next" in printed and "\\x1b 50% · '\\r' 40%" in printed


def test_to_dict_is_plain_data(explanation):
    data = explanation.to_dict()
    assert data["text"] == TEXT
    assert data["tokens"][0]["position"] == 1
    assert set(data["tokens"][0]) == {"position", "token", "text", "fve", "kl", "top_before", "top_after"}


@pytest.mark.parametrize(
    "text, positions, message",
    [
        ("", None, "explain: got an empty text"),
        ([TEXT, TEXT], None, "explain: got list for a text; pass one string"),
        ("half \ud83d", None, "half a character"),
        (
            " ".join(["w9"] * MAX_POSITIONS),
            None,
            rf"has {MAX_POSITIONS + 1} tokens, the subject reads {MAX_POSITIONS}",
        ),
        (TEXT, [1, 6], r"position 6 lies outside the text's 0\.\.5"),
        (TEXT, [-7], r"position -7 lies outside the text's 0\.\.5"),
        (TEXT, [], "explain: got no positions"),
        (TEXT, 1, "explain: positions must be a list, got 1; for one token, a list of one"),
        (TEXT, [1, 0.5], r"explain: a position must be a whole number, got 0\.5; count tokens from 0"),
        (TEXT, "1", "explain: a position must be a whole number, got '1'"),
    ],
)
def test_bad_input_is_a_one_line_error(lens, text, positions, message):
    with pytest.raises(ValueError, match=message) as error:
        lens.explain(text, positions)
    assert "\n" not in str(error.value)


def test_the_longest_text_is_read(lens):
    assert len(lens.explain(" ".join(["w9"] * (MAX_POSITIONS - 1)), positions=[MAX_POSITIONS - 1])) == 1


def test_a_pretrained_model_is_explained(stories260k):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories260k), AutoTokenizer.from_pretrained(stories260k)
    lens = ConsistencyLensModel.from_subject(model, tokenizer, layer=3).eval()
    rows = lens.explain("Once upon a time there was a little dog")
    assert "".join(row.token for row in rows).replace(" ", "") == "Onceuponatimetherewasalittledog"
