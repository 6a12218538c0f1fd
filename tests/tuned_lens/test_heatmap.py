"""The heatmap of a prompt: what its cells and its page say, whatever the tokens hold."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from sweep_records import made_up, record

from consistency_lens.tuned_lens.heatmap import QUANTITIES, heatmap_figure, heatmap_html, prompt_ids, visible

HOSTILE = "</script><script>alert(1)</script>\u202e$x$\n"


class Page(HTMLParser):
    """The elements of a page, and the text of each script and title."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open = f"{tag}#{dict(attributes).get('id', '')}"

    def handle_data(self, data):
        self.texts[self.open] = self.texts.get(self.open, "") + data

    @property
    def data(self):
        return json.loads(self.texts["script#data"])


@pytest.fixture(scope="module")
def lenses():
    return {lens: made_up(lens, layers=3, tokens=4, prompts=2) for lens in ("norm", "tuned")}


def of_layer(records, layer):
    return [r for r in records if r.prompt_id == "prompt-1" and r.layer == layer]


class TestVisible:
    @pytest.mark.parametrize(
        "token, shown",
        [
            (" Berlin", "␣Berlin"),
            ("\n\t", "⏎⇥"),
            ("\x00\x1b[31m", "⟨U+0000⟩⟨U+001B⟩[31m"),
            ("a\u202eb\u200fc", "a⟨U+202E⟩b⟨U+200F⟩c"),
            ("\u00a0\u3000\u2028", "⟨U+00A0⟩⟨U+3000⟩⟨U+2028⟩"),
            ("\ud800", "⟨U+D800⟩"),
            ("שלום 東京 é 🙂", "שלום␣東京␣é␣🙂"),
            ("", "⟨empty⟩"),
        ],
    )
    def test_every_character_can_be_seen(self, token, shown):
        assert visible(token) == shown

    def test_plain_spaces_may_stay(self):
        assert visible("two words\n", spaces=False) == "two words⏎" and visible("", spaces=False) == ""


class TestFigure:
    def test_colours_are_the_values_with_the_last_layer_on_top(self, lenses):
        norm, tuned = heatmap_figure(lenses, "prompt-1").axes[:2]
        for axes, lens in ((norm, "norm"), (tuned, "tuned")):
            rows = [[r.kl_from_final_bits for r in of_layer(lenses[lens], layer)] for layer in range(3)]
            assert np.array_equal(axes.images[0].get_array(), rows)
            low, high = axes.get_ylim()
            assert low < high and [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]

    def test_both_lenses_share_one_scale(self, lenses):
        norm, tuned = heatmap_figure(lenses, "prompt-1").axes[:2]
        highest = max(r.kl_from_final_bits for of in lenses.values() for r in of if r.prompt_id == "prompt-1")
        assert norm.images[0].get_clim() == tuned.images[0].get_clim() == (0, highest)

    @pytest.mark.parametrize("quantity", QUANTITIES)
    def test_quantities(self, lenses, quantity):
        figure = heatmap_figure({"norm": lenses["norm"]}, "prompt-1", quantity)
        first = of_layer(lenses["norm"], 0)[0]
        value = {"kl": first.kl_from_final_bits, "entropy": first.entropy_bits, "probability": first.top20[0][2]}
        assert figure.axes[0].images[0].get_array()[0, 0] == value[quantity]
        assert figure.axes[-1].get_xlabel() == QUANTITIES[quantity]

    def test_cells_hold_the_top_tokens_and_the_answer_is_bold(self, lenses):
        axes = heatmap_figure({"tuned": lenses["tuned"]}, "prompt-1").axes[0]
        texts = {tuple(map(round, text.get_position())): text for text in axes.texts}
        for layer in range(3):
            for position, of in enumerate(of_layer(lenses["tuned"], layer)):
                text = texts[position, layer]
                assert text.get_text() == visible(of.top20[0][1])
                assert text.get_weight() == ("bold" if of.is_answer else "normal")
        assert texts[3, 2].get_weight() == "bold"
        assert [label.get_text() for label in axes.get_xticklabels()] == ["<|begin|>", "␣The", "␣capital", "␣of"]

    def test_a_long_prompt_is_cut_and_says_so(self):
        figure = heatmap_figure({"norm": made_up("norm", layers=1, tokens=70, prompts=1)}, "prompt-0")
        assert figure.axes[0].get_title() == "norm lens, last 64 of 70 tokens"
        assert figure.axes[0].images[0].get_array().shape == (1, 64)

    def test_long_prompts_have_the_lenses_one_above_the_other(self):
        wide = {lens: made_up(lens, layers=2, tokens=13, prompts=1) for lens in ("norm", "tuned")}
        first, second = (axes.get_subplotspec() for axes in heatmap_figure(wide, "prompt-0").axes[:2])
        assert (first.rowspan.start, second.rowspan.start) == (0, 1)

    def test_hostile_tokens_are_no_formulas(self):
        records = [record(token=HOSTILE, top20=[(1, "$x^{", 0.5)])]
        figure = heatmap_figure({"norm": records}, "capital")
        figure.draw_without_rendering()
        assert figure.axes[0].texts[0].get_text() == "$x^{"

    def test_unknown_quantity(self, lenses):
        with pytest.raises(ValueError, match="quantity must be one of kl, entropy, probability, got 'nats'"):
            heatmap_figure(lenses, "prompt-1", "nats")


class TestPage:
    def test_holds_the_numbers_of_every_cell(self, lenses):
        data = Page(heatmap_html(lenses, "prompt-1")).data
        assert data["tokens"] == ["<|begin|>", "␣The", "␣capital", "␣of"]
        for lens, records in lenses.items():
            for layer in range(3):
                for of, cell in zip(of_layer(records, layer), data["lenses"][lens][layer], strict=True):
                    assert cell["layer"] == layer
                    assert cell["kl"] == pytest.approx(of.kl_from_final_bits, rel=1e-3)
                    assert cell["back"] == pytest.approx(of.kl_to_final_bits, rel=1e-3)
                    assert cell["entropy"] == pytest.approx(of.entropy_bits, rel=1e-3)
                    assert cell["teacher"] == 1 and cell["cos"] == pytest.approx(of.cos_to_final, rel=1e-3)
                    assert [data["words"][word] for word in cell["top"][::2]] == [visible(t) for _, t, _ in of.top20]
                    assert cell["top"][1::2] == pytest.approx([p for *_, p in of.top20], rel=1e-3)
                    assert cell.get("rank") == of.answer_rank and cell.get("hit", False) == bool(of.is_answer)

    def test_is_one_file(self, lenses):
        text = heatmap_html(lenses, "prompt-1", "a model")
        page = Page(text)
        assert not re.search(r"https?:|//[a-z]|url\(|@import|\bfetch\(|XMLHttp", text)
        assert {"link", "img", "iframe"}.isdisjoint(tag for tag, _ in page.elements)
        assert not any("src" in attributes or "href" in attributes for _, attributes in page.elements)
        assert page.texts["title#"].strip() == "a model: prompt-1"

    def test_hostile_text_stays_text(self):
        of = record(
            prompt_id=f"id{HOSTILE}", prompt=HOSTILE, token=HOSTILE, top20=[(1, HOSTILE, 0.5)], answer=HOSTILE,
            answer_id=1, answer_rank=1, answer_probability=0.5,
        )  # fmt: skip
        plain = heatmap_html({"norm": [record()]}, "capital")
        text = heatmap_html({"norm": [of]}, f"id{HOSTILE}", title=f"title{HOSTILE}")
        page = Page(text)
        assert [tag for tag, _ in page.elements if tag != "bdi"] == [
            tag for tag, _ in Page(plain).elements if tag != "bdi"
        ]
        assert "alert(1)</script>" not in text and "\u202e" not in text
        shown = "</script><script>alert(1)</script>⟨U+202E⟩$x$⏎"
        assert page.data["tokens"] == [shown.replace(" ", "␣")] and page.data["words"] == [shown]
        text.encode()  # a half of a pair would be an error

    def test_every_lens_and_quantity_can_be_chosen(self, lenses):
        inputs = [attributes for tag, attributes in Page(heatmap_html(lenses, "prompt-1")).elements if tag == "input"]
        assert {(i["name"], i["value"]) for i in inputs} == {
            *(("lens", lens) for lens in lenses), *(("quantity", quantity) for quantity in QUANTITIES),
        }  # fmt: skip
        assert [i["value"] for i in inputs if "checked" in i] == ["tuned", "kl"]

    def test_without_an_answer(self):
        data = Page(heatmap_html({"norm": [record()]}, "capital")).data
        assert "rank" not in data["lenses"]["norm"][0][0] and "hit" not in data["lenses"]["norm"][0][0]


def test_prompts_in_their_order(lenses):
    assert prompt_ids(lenses["norm"]) == ["prompt-0", "prompt-1"]


@pytest.mark.parametrize("draw", [heatmap_figure, heatmap_html])
def test_an_unknown_prompt_is_told_with_the_known_ones(lenses, draw):
    with pytest.raises(ValueError, match="no records of 'paris'; there are 'prompt-0', 'prompt-1'$"):
        draw(lenses, "paris")


def test_a_missing_cell_is_an_error(lenses):
    with pytest.raises(ValueError, match="prompt 'prompt-1': no record of layer 2 at position 3"):
        heatmap_html({"norm": lenses["norm"][:-1]}, "prompt-1")
