import pytest
from report_documents import made_up_explorer

from consistency_lens.report.cases import CASES, cases, sample_cases, spread


def sample(fve, context="Once «upon»"):
    top = [["a", 0.5], ["b", 0.2]]
    return {
        "context": context, "explanation": "words", "fve": fve, "kl": 1.0, "top_before": top, "top_after": top
    }  # fmt: skip


def test_the_extremes_of_each_text():
    explorer = made_up_explorer(texts=9, tokens=30)
    found = cases(explorer, [])
    ranked = sorted((max(text["fve"]) for text in explorer["texts"]), reverse=True)
    assert [case["fve"] for case in found["best"]] == ranked[:CASES]
    assert [case["fve"] for case in found["worst"]] == sorted(min(text["fve"]) for text in explorer["texts"])[:CASES]
    case = found["worst"][0]
    text, token = case["place"]
    of = explorer["texts"][text]
    assert case["token"] == explorer["words"][of["tokens"][token]] and case["kl"] == of["kl"][token]
    assert case["context"].endswith(explorer["words"][of["tokens"][token - 1]])
    assert case["explanation"] == "".join(of["explanations"][token])
    assert case["before"][0] == [explorer["words"][of["before"][token][0]], of["before"][token][1]]


def test_one_thing_said_twice_is_one_case():
    explorer = made_up_explorer(texts=2, tokens=10)
    explorer["texts"][1] = explorer["texts"][0]
    assert len(cases(explorer, [])["best"]) == 1


def test_samples_stand_in():
    found = cases(None, sample_cases([sample(fve / 10) for fve in (3, 9, 1, 5)]))
    assert [case["fve"] for case in found["best"]] == [0.9, 0.5]
    assert [case["fve"] for case in found["worst"]] == [0.1, 0.3]
    assert found["best"][0]["place"] is None
    assert cases(None, sample_cases([sample(0.1)])) is None


@pytest.mark.parametrize(
    ("context", "before", "token"),
    [
        ("Once «upon»", "Once ", "upon"),
        ("say «hi» «to»", "say «hi» ", "to"),
    ],
)
def test_the_token_of_a_sample(context, before, token):
    (case,) = sample_cases([sample(0.1, context)])
    assert (case["context"], case["token"]) == (before, token)


def test_a_spread_leaves_out_the_ends():
    samples = sample_cases([sample(fve) for fve in (8, 0, 4, 2, 6, 1, 3, 5, 7)])
    assert [case["fve"] for case in spread(samples)] == [6, 4, 2]
    assert len(spread(samples[:2])) == 2
