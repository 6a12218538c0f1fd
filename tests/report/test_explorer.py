import pytest
from tiny_lenses import disturb, tiny_lens

from consistency_lens.evaluation.ablation import word_importance
from consistency_lens.report import explorer as explorer_module
from consistency_lens.report.explorer import read_texts

TEXT = "w9 w10 w11 w12 w13 w9 w20"


@pytest.fixture(scope="module")
def lens():
    return disturb(tiny_lens(), scale=0.3)


def read(lens, *texts, max_tokens=100, **settings):
    ids = [lens.tokenizer(f"<s> {text}", add_special_tokens=False)["input_ids"] for text in texts]
    titled = ((f"text {index}", of) for index, of in enumerate(ids))
    return read_texts(lens, titled, source="tests", max_tokens=max_tokens, **settings)


@pytest.fixture(scope="module")
def explorer(lens):
    return read(lens, TEXT)


def test_says_what_explain_says(lens, explorer):
    (text,), words = explorer["texts"], explorer["words"]
    for index, expected in enumerate(lens.explain(TEXT)):
        assert text["positions"][index] == expected.position
        assert words[text["tokens"][index]].strip() == expected.token
        assert "".join(text["explanations"][index]) == expected.text
        assert text["fve"][index] == pytest.approx(expected.fve, rel=2e-3)
        assert text["kl"][index] == pytest.approx(expected.kl, rel=2e-3, abs=1e-6)
        for column, top in (("before", expected.top_before), ("after", expected.top_after)):
            assert [words[place] for place in text[column][index][::2]][:3] == [token for token, _ in top]
            assert text[column][index][1::2][:3] == pytest.approx([share for _, share in top], rel=2e-3)
            assert len(text[column][index]) == 10


def test_norm_and_variance(lens, explorer):
    (text,) = explorer["texts"]
    activations = lens.activations(TEXT)
    assert text["norm"] == pytest.approx(activations.norm(dim=-1).tolist(), rel=1e-3)
    assert text["variance"] == pytest.approx((activations - lens.mean).square().sum(-1).tolist(), rel=1e-3)


def test_losses_are_those_of_the_ablation(lens, explorer):
    (text,), activations = explorer["texts"], lens.activations(TEXT)
    for index, (words, losses) in enumerate(zip(text["explanations"], text["losses"], strict=True)):
        expected = word_importance(lens, activations[index], "".join(words))
        assert [word.strip() for word in words] == [word for word, _ in expected]
        assert losses == pytest.approx([loss for _, loss in expected], rel=2e-3, abs=2e-4)


def test_the_ablation_can_be_left_out(lens, explorer):
    (text,) = read(lens, TEXT, ablation=False)["texts"]
    assert text["losses"] == [[]] * 7 and text["fve"] == explorer["texts"][0]["fve"]


def test_a_text_of_one_word_loses_nothing_by_name(lens):
    (words,) = explorer_module.losses_without_words(lens, lens.activations("w9"), ["w5"])
    assert words == []


def test_long_texts_are_read_in_parts(lens, explorer, monkeypatch):
    monkeypatch.setattr(explorer_module, "POSITIONS", 3)
    monkeypatch.setattr(explorer_module, "ABLATED", 2)
    (whole,), (parts,) = explorer["texts"], read(lens, TEXT)["texts"]
    assert parts["explanations"] == whole["explanations"]
    for column in ("fve", "kl", "norm"):
        assert parts[column] == pytest.approx(whole[column], rel=2e-3, abs=1e-5)
    for losses, expected in zip(parts["losses"], whole["losses"], strict=True):
        assert losses == pytest.approx(expected, rel=2e-3, abs=2e-4)


def test_no_more_tokens_than_asked_for(lens):
    explorer = read(lens, TEXT, "w30 w31 w32", "w33", max_tokens=9)
    assert [len(text["tokens"]) for text in explorer["texts"]] == [7, 2]
    assert explorer["max_tokens"] == 9


def test_words_are_kept_once(explorer):
    assert len(explorer["words"]) == len(set(explorer["words"]))


def test_nothing_to_read(lens):
    with pytest.raises(ValueError, match="texts: there is no token to read"):
        read(lens, "")
