import pytest
from report_documents import WORDS, made_up_explorer

from consistency_lens.report.profiles import BINS, MIN_TOKENS, profiles


@pytest.fixture(scope="module")
def explorer():
    return made_up_explorer(texts=6, tokens=50)


def rows(explorer):
    """(piece, position, fve, kl, norm, variance) of every token."""
    for text in explorer["texts"]:
        pieces = [WORDS[place] for place in text["tokens"]]
        yield from zip(pieces, *(text[n] for n in ("positions", "fve", "kl", "norm", "variance")), strict=True)


def pooled(chosen):
    chosen = list(chosen)
    variance = sum(row[5] for row in chosen)
    fve = 1 - sum((1 - row[2]) * row[5] for row in chosen) / variance
    return len(chosen), fve, *(sum(row[column] for row in chosen) / len(chosen) for column in (3, 4))


def test_positions_are_binned_whole(explorer):
    groups = profiles(explorer)["position"]
    assert len(groups) == BINS and sum(group["tokens"] for group in groups) == 300
    for group in groups:
        low, high = map(int, group["label"].split("–"))
        count, fve, kl, norm = pooled(row for row in rows(explorer) if low <= row[1] <= high)
        assert group["tokens"] == count
        values = {name: of[0] for name, of in group["values"].items()}
        assert values == pytest.approx({"fve": fve, "kl": kl, "norm": norm})


def test_classes_are_pooled_and_have_intervals(explorer):
    groups = {group["label"]: group for group in profiles(explorer)["token_class"]}
    count, fve, *_ = pooled(row for row in rows(explorer) if row[0] in (",", "."))
    assert groups["punctuation"]["tokens"] == count
    value, low, high = groups["punctuation"]["values"]["fve"]
    assert value == pytest.approx(fve) and low < value < high


def test_one_text_has_no_interval_and_few_tokens_no_group():
    groups = profiles(made_up_explorer(texts=1, tokens=BINS * MIN_TOKENS))
    assert groups["position"] and all(len(of) == 1 for group in groups["position"] for of in group["values"].values())
    assert profiles(made_up_explorer(texts=1, tokens=MIN_TOKENS - 1)) == {"position": [], "token_class": []}
