"""The page of a report in a real browser: pointer, keys, colours, a phone's width, and text that means harm."""

import copy
import json
from pathlib import Path

import pytest
from browser import OpenedPage, chromium
from report_documents import made_up_explorer, made_up_report, made_up_text_length
from sweep_records import made_up
from test_report_page import HOSTILE

from consistency_lens.report.document import report_document
from consistency_lens.report.page import render_page
from consistency_lens.report.run_folder import read_run
from consistency_lens.tuned_lens.heatmap import heatmap_data

pytestmark = pytest.mark.browser

CARDS = Path(__file__).parents[2] / "model_cards" / "tiny_stories"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
SELECTED = ".token[aria-selected='true']"
SIZE = (4, 60)  # texts, and tokens of each
DRAWN = "document.querySelectorAll('figure svg').length === document.querySelectorAll('figure').length"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def run():
    return read_run(CARDS)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A report with all its parts: figures of a real run, made up texts, curves and layers."""
    run.log.extend(
        {"step": step, "stage": 1 + step // 5, "ce": 3 - step / 5, "eval_fve": step / 10} for step in range(9)
    )
    run.metrics["text_length"] = made_up_text_length()
    records = {lens: made_up(lens, layers=3, tokens=6, prompts=1) for lens in ("norm", "tuned")}
    layers = heatmap_data(records, "prompt-0") | {"labels": {"norm": "norm lens", "tuned": "tuned lens"}}
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(report_document(run, made_up_explorer(*SIZE), layers)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def opened(browser, whole):
    opened = OpenedPage(browser, whole, viewport={"width": 1280, "height": 900})
    yield opened
    opened.close()


def open_with(browser, folder, document, **context):
    path = folder / "page.html"
    path.write_text(render_page(document), encoding="utf-8")
    return OpenedPage(browser, path, **context)


def panel_words(page):
    """The words of the explanation that is shown, without the numbers below them."""
    return page.eval_on_selector_all(".panel .word", "all => all.map(word => word.firstChild.textContent)")


def expected_words(text, token):
    return [word.strip() or "⏎" for word in made_up_explorer(*SIZE)["texts"][text]["explanations"][token]]


class TestReport:
    def test_every_part_is_there_and_nothing_goes_wrong(self, opened, whole):
        page = opened.page
        for section in page.query_selector_all("main > section"):
            assert not section.get_attribute("hidden"), section.get_attribute("id")
        page.wait_for_function(DRAWN)
        assert page.locator("figure svg").count() >= 10
        assert page.locator("nav a").count() == 9
        assert opened.problems == [] and opened.requests == [whole.as_uri()]

    def test_the_first_screen_has_words_and_figures(self, opened, run):
        page = opened.page
        page.evaluate("scrollTo({top: 0, behavior: 'instant'})")
        for selector in (".tile strong", ".case .said", "[data-part=comparison] svg"):
            assert page.locator(selector).first.bounding_box()["y"] < 900
        assert page.locator(".tile strong").first.inner_text() == f"{run.metrics['fve']:.0%}"

    def test_charts_say_what_they_are(self, opened):
        labels = opened.page.eval_on_selector_all("figure svg[role=img]", "all => all.map(one => one.ariaLabel)")
        assert len(labels) >= 10 and all(labels)
        assert "FVE where the encoder reads only so many tokens" in labels
        assert "cross-entropy of true text, nats a token" in labels


class TestExplorer:
    def test_a_token_that_is_pointed_at_is_explained(self, opened):
        page = opened.page
        tokens = page.locator("[role=listbox]").nth(0).locator(".token")
        tokens.nth(7).hover()
        assert panel_words(page) == expected_words(0, 7)
        tokens.nth(9).hover()
        assert panel_words(page) == expected_words(0, 9)
        assert page.locator(".panel .tops ol").count() == 2

    def test_a_click_stays(self, opened):
        page = opened.page
        page.locator("[role=listbox]").nth(0).locator(".token").nth(5).click()
        page.mouse.move(2, 2)
        assert panel_words(page) == expected_words(0, 5)
        assert page.locator(SELECTED).count() == 1

    def test_keys(self, opened):
        page = opened.page
        page.locator("[role=listbox]").nth(0).locator(".token").nth(5).click()
        page.mouse.move(2, 2)

        def after(*keys):
            for key in keys:
                page.keyboard.press(key)
            return page.evaluate("explorer.current")

        assert after("ArrowRight") == [0, 6] and after("ArrowLeft", "ArrowLeft") == [0, 4]
        assert after("Home") == [0, 0] and after("End") == [0, 59]
        assert after("ArrowRight") == [1, 0] and after("ArrowLeft") == [0, 59]
        assert after("j") == [1, 0] and after("j") == [2, 0] and after("k") == [1, 0]
        assert panel_words(page) == expected_words(1, 0)
        below = after("ArrowDown")
        assert below > [1, 0] and after("ArrowUp") == [1, 0]
        assert page.locator("select").input_value() == "1"
        assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"

    def test_focus_is_seen(self, opened):
        page = opened.page
        page.locator("[role=listbox]").nth(0).locator(".token").nth(3).click()
        style = page.evaluate(
            "(style => [style.outlineStyle, style.outlineWidth])(getComputedStyle(document.activeElement))"
        )
        assert style == ["solid", "3px"]

    def test_tab_leads_to_one_token(self, opened):
        assert opened.page.locator(".token[tabindex='0']").count() == 1

    def test_colours_can_be_chosen(self, opened):
        page = opened.page

        def colours():  # of the first text: others may come into view meanwhile
            return page.eval_on_selector_all(
                ".text:first-of-type .token", "all => all.map(one => getComputedStyle(one).backgroundColor)"
            )

        by_fve = colours()
        page.get_by_role("radio", name="KL").check()
        by_kl = colours()
        page.locator(SELECTED).focus()
        page.keyboard.press("c")
        by_norm = colours()
        assert len({tuple(by_fve), tuple(by_kl), tuple(by_norm)}) == 3
        assert "norm" in page.locator(".scale").inner_text()
        page.get_by_role("radio", name="FVE").check()
        assert colours() == by_fve

    def test_a_case_leads_to_its_token(self, opened):
        page = opened.page
        page.locator("#cases button").first.click()
        place = json.loads(page.evaluate("JSON.stringify(explorer.current)"))
        assert place == page.evaluate("report.cases.best[0].place")

    def test_the_words_are_shaded_by_what_is_lost_without_them(self, opened):
        page = opened.page
        page.locator("[role=listbox]").nth(0).locator(".token").nth(5).click()
        losses = made_up_explorer(*SIZE)["texts"][0]["losses"][5]
        shown = page.eval_on_selector_all(
            ".panel .word", "all => all.map(one => Number(one.className.match(/level-(.)/)[1]))"
        )
        assert shown == [int(min(1, max(0, loss)) * 8 + 0.5) for loss in losses]


# Contrast of the ink on each level of each quantity (WCAG 2).
CONTRASTS = """() => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const luminance = colour => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const quantity of ["fve", "kl", "norm"]) {
    explorer.setQuantity(quantity);
    for (const step of document.querySelectorAll(".step")) {
      const {backgroundColor, color} = getComputedStyle(step);
      const [light, dark] = [luminance(backgroundColor), luminance(color)].sort((a, b) => b - a);
      found.push((light + 0.05) / (dark + 0.05));
    }
  }
  return found;
}"""


class TestLooks:
    def test_dark_where_the_system_is_dark_and_legible_in_both(self, browser, whole):
        grounds = {}
        for scheme in ("light", "dark"):
            opened = OpenedPage(browser, whole, color_scheme=scheme)
            grounds[scheme] = opened.page.evaluate(BACKGROUND)
            contrasts = opened.page.evaluate(CONTRASTS)
            assert len(contrasts) == 27 and min(contrasts) >= 4.5
            if scheme == "light":
                opened.page.locator("#theme").click(click_count=2)
                assert opened.page.evaluate("document.documentElement.dataset.theme") == "dark"
                grounds["switched"] = opened.page.evaluate(BACKGROUND)
            assert opened.problems == []
            opened.close()
        assert grounds["light"] == "rgb(255, 255, 255)" and grounds["switched"] == grounds["dark"] != grounds["light"]

    def test_a_phone_scrolls_down_alone(self, browser, whole):
        opened = OpenedPage(browser, whole, **PHONE)
        page = opened.page
        page.wait_for_function(DRAWN)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.locator("[role=listbox]").nth(0).locator(".token").nth(4).tap()
        assert panel_words(page) == expected_words(0, 4)
        assert opened.problems == []
        opened.close()


class TestScale:
    def test_of_ten_thousand_tokens_few_are_in_the_page(self, browser, tmp_path):
        opened = open_with(browser, tmp_path, made_up_report(made_up_explorer(texts=80, tokens=125)))
        page = opened.page
        assert page.evaluate("report.explorer.texts.reduce((sum, text) => sum + text.tokens.length, 0)") == 10_000
        page.locator(".flow").scroll_into_view_if_needed()
        assert 0 < page.locator(".token").count() < 2_500
        # the others are plain text until they are asked for, which the browser's own search finds
        assert page.locator(".block:not(:has(.token))").count() > 50
        assert page.evaluate("[...document.querySelectorAll('.block')].every(block => block.textContent.length > 100)")
        page.locator("select").select_option("79")
        assert page.evaluate("explorer.current") == [79, 0]
        page.keyboard.press("End")
        assert page.locator(SELECTED).is_visible() and page.evaluate("explorer.current") == [79, 124]
        assert page.locator(".token").count() < 5_000
        assert page.locator("[role=listbox]").count() == 80 and opened.problems == []
        opened.close()


@pytest.fixture(scope="module")
def hostile(browser, tmp_path_factory):
    explorer = copy.deepcopy(made_up_explorer(texts=2, tokens=20))
    words = [
        HOSTILE, "<svg/onload=alert(3)>", "' onmouseover='alert(4)", "javascript:alert(5)", "שלום", "🐶" * 40,
        "\u202e\u2066abc", "y" * 1_000_000, "{{ 7 * 7 }}", "\x00\x1b[31m",
    ]  # fmt: skip
    explorer["words"][: len(words)] = words
    for text in explorer["texts"]:
        text["title"] = HOSTILE
        text["explanations"] = [[words[token % 10], *words[:2]] for token in range(20)]
    case = {
        "context": HOSTILE, "token": HOSTILE, "explanation": HOSTILE, "fve": 0.1, "kl": 0.2, "place": None,
        "before": [[HOSTILE, 0.5]], "after": [[HOSTILE, 0.5]],
    }  # fmt: skip
    names = dict.fromkeys(("name", "label", "meaning"), HOSTILE)
    point = {**names, "fve": 0.2, "kl_recovered": 0.1, "interval": None}
    layers = heatmap_data({"norm": made_up("norm", layers=2, tokens=3, prompts=1)}, "prompt-0")
    layers |= {"words": [HOSTILE] * len(layers["words"]), "tokens": [HOSTILE] * 3, "labels": {"norm": HOSTILE}}
    document = made_up_report(
        explorer, title=HOSTILE, lead=[HOSTILE], notes=[HOSTILE], provenance=[[HOSTILE, HOSTILE]],
        heatmap=layers, examples=[case], cases={"best": [case], "worst": [case]}, comparison=[point], readers=[point],
        verdict={"below": [HOSTILE]}, tables=[{"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]]}],
        figures=[{"name": "fve", "label": HOSTILE, "value": 0.1, "interval": None, "decimals": 2}],
        curves={"charts": [{"title": HOSTILE, "unit": "", "lines": [{"label": HOSTILE, "points": [[1, 2], [2, 3]]}]}],
                "stages": [{"label": HOSTILE, "start": 1}]},
    )  # fmt: skip
    opened = open_with(browser, tmp_path_factory.mktemp("hostile"), document, viewport={"width": 390, "height": 844})
    yield opened
    opened.close()


class TestHostileText:
    def test_nothing_runs_and_nothing_is_asked_for(self, hostile):
        page = hostile.page
        page.wait_for_function(DRAWN)
        for token in range(12):
            page.evaluate("token => explorer.select(0, token)", token)
        assert hostile.problems == [] and len(hostile.requests) == 1
        assert page.locator("img, main script, iframe, [onload], [onerror], [onmouseover]").count() == 0

    def test_it_is_shown_as_it_is(self, hostile):
        shown = hostile.page.locator(".notes li").inner_text()
        assert shown.startswith("</script><script>alert(1)</script><!--<img") and "⟨U+2028⟩⟨U+202E⟩" in shown

    def test_a_token_of_a_million_letters_leaves_the_page_its_width(self, hostile):
        assert hostile.page.evaluate("document.documentElement.scrollWidth") == 390

    def test_the_policy_stops_what_would_run(self, hostile):
        page = hostile.page
        page.evaluate("""() => {
          const script = document.createElement("script");
          script.textContent = "window.ran = true";
          document.body.append(script);
          const image = document.createElement("div");
          image.setAttribute("onclick", "window.ran = true");
          document.body.append(image);
          image.click();
        }""")
        assert page.evaluate("window.ran") is None
        assert len(hostile.problems) == 2 and all("Content Security Policy" in told for told in hostile.problems)
