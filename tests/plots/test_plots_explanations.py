import sys

import pytest
from browser import OpenedPage, chromium
from drawn_texts import no_text_covers_another
from matplotlib import colormaps
from matplotlib.colors import to_hex

from consistency_lens import Explanation, TokenExplanation, plots
from consistency_lens.plots.explanations import MAX_TOKENS

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>$x^{$"


def explained(*words, fve=0.5):
    tokens = [
        TokenExplanation(
            position=index + 1, token=f" {word}", text=f" {word}\nof the words", fve=fve, kl=0.25 * index,
            top_before=[(f" {word}", 0.75), (" of", 0.2)], top_after=[(" of", 0.5), (" it", 0.4)],
        )
        for index, word in enumerate(words)
    ]  # fmt: skip
    return Explanation(" ".join(words), tokens)


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_row_has_words_figures_and_predictions():
    drawn = texts(plots.explanation(explained("dog", "cat"), title="Two words"))
    assert drawn[:6] == ["token", "the lens's words", "FVE", "KL, nats", "next, before", "after"]
    assert drawn[6:12] == ["dog", "dog⏎of the words", "0.50", "0.00", "dog 75%", "of 50%"]
    assert drawn[12:18] == ["cat", "cat⏎of the words", "0.50", "0.25", "cat 75%", "of 50%"]
    assert drawn[-1].startswith("Colour: FVE from 0 (dark) to 1 (bright)")


@pytest.mark.parametrize(("fve", "place"), [(-3.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_the_colour_is_the_fve(fve, place):
    box = plots.explanation(explained("dog", fve=fve)).axes[0].texts[6].get_bbox_patch()
    assert to_hex(box.get_facecolor()) == to_hex(colormaps["cividis"](place))


def test_no_text_covers_another_however_long(monkeypatch):
    words = ("dog", "a_very_long_word_that_goes_on", "x " * 120, HOSTILE, "שלום", "\x00")
    assert no_text_covers_another(plots.explanation(explained(*words)), monkeypatch) > 30


def test_plotly_shows_the_same_in_a_table_of_any_length():
    (table,) = plots.explanation(explained("dog", *["cat"] * MAX_TOKENS), interactive=True).data
    assert [column[0] for column in table.cells.values] == [
        "dog", "dog⏎of the words", "0.50", "0.00", "dog 75% · of 20%", "of 50% · it 40%"
    ]  # fmt: skip
    assert len(table.cells.values[0]) == MAX_TOKENS + 1 and table.header["values"][3] == "<b>KL, nats</b>"


def test_too_many_tokens_and_none_are_errors():
    with pytest.raises(ValueError, match=f"room for {MAX_TOKENS} tokens, got {MAX_TOKENS + 1}; pass some"):
        plots.explanation(explained(*["cat"] * (MAX_TOKENS + 1)))
    with pytest.raises(ValueError, match="got no tokens; pass what lens.explain gives"):
        plots.explanation(explained())


@pytest.mark.parametrize(("package", "interactive"), [("matplotlib", False), ("plotly", True)])
def test_a_missing_library_is_named_with_its_extra(package, interactive, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package '{package}'.*\"consistency-lens\[plots\]\""):
        plots.explanation(explained("dog"), interactive=interactive)


@pytest.mark.browser
def test_words_of_a_model_never_run_in_a_page(tmp_path):
    page = tmp_path / "page.html"
    figure = plots.explanation(explained("dog", HOSTILE), title=HOSTILE, interactive=True)
    figure.write_html(page, include_plotlyjs="directory")
    with chromium() as browser:
        opened = OpenedPage(browser, page, ready=".main-svg .table")
        shown = opened.page.locator(".main-svg").first.text_content()
        assert opened.problems == []
        assert {request.partition(":")[0] for request in opened.requests} <= {"file", "blob", "data"}
        assert shown.count("<script>alert(1)</script>") == 3  # as a token, in the words, in a prediction
        opened.close()
