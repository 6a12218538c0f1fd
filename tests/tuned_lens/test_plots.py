"""The figures of a sweep: what is read back from their axes is what the records say."""

import sys

import numpy as np
import pytest
from drawn_texts import no_text_covers_another
from sweep_records import made_up, record

from consistency_lens.tuned_lens.depth import layer_at_depth
from consistency_lens.tuned_lens.plots import (
    cos_figure,
    delta_kl_figure,
    kl_figure,
    median_crossing,
    overview_figure,
    rank_figure,
)

# (layer, KL of the norm lens, KL of the tuned lens) at five positions; sorted, so that quartiles can be read off
KLS = {0: ([1, 2, 3, 4, 5], [1, 1.5, 2, 2, 2.5]), 1: ([0, 0, 1, 1, 9], [0, 0, 1, 2, 8]), 2: ([0] * 5, [0] * 5)}


@pytest.fixture
def lenses():
    """Two lenses, three layers, one prompt of five positions."""
    return {
        lens: [
            record(lens=lens, layer=layer, position=position, kl_from_final_bits=kl, cos_to_final=1 - kl / 10)
            for layer, both in KLS.items()
            for position, kl in enumerate(both[place])
        ]
        for place, lens in enumerate(("norm", "tuned"))
    }


def answered(prompt, lens="norm", ranks=(100, 8, 1), **milestones):
    """The last position of a prompt at each layer."""
    first = {f"first_rank_le_{rank}": milestones.get(f"le_{rank}") for rank in (10, 5, 1)}
    return [
        record(prompt_id=prompt, lens=lens, layer=layer, answer=" B", answer_id=7, answer_rank=rank, **first)
        for layer, rank in enumerate(ranks)
    ]


def lines(axes):
    """label -> (xs, ys) of the lines that the legend names."""
    handles, labels = axes.get_legend_handles_labels()
    return {
        label: handle.get_data() for handle, label in zip(handles, labels, strict=True) if "line" in str(type(handle))
    }


def band(collection):
    """layer -> (lowest, highest) of a filled band."""
    points = np.concatenate([path.vertices for path in collection.get_paths()])
    return {x: (points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in set(points[:, 0])}


class TestLines:
    def test_kl_is_the_median_and_its_quartiles(self, lenses):
        (axes,) = kl_figure(lenses).axes
        drawn = lines(axes)
        assert drawn["norm lens"][0].tolist() == [0, 1, 2]
        assert drawn["norm lens"][1].tolist() == [3, 1, 0]
        assert drawn["tuned lens"][1].tolist() == [2, 1, 0]
        norm, tuned = (band(collection) for collection in axes.collections)
        assert norm == {0: (2, 4), 1: (0, 1), 2: (0, 0)}
        assert tuned == {0: (1.5, 2), 1: (0, 2), 2: (0, 0)}

    def test_cosine(self, lenses):
        (axes,) = cos_figure(lenses).axes
        assert lines(axes)["norm lens"][1] == pytest.approx([0.7, 0.9, 1])
        assert lines(axes)["tuned lens"][1] == pytest.approx([0.8, 0.9, 1])

    def test_rank_is_over_prompts_on_a_log_axis(self):
        records = answered("a", ranks=(100, 8, 1)) + answered("b", ranks=(50, 4, 1)) + answered("c", ranks=(900, 9, 2))
        (axes,) = rank_figure({"norm": records}).axes
        assert axes.get_yscale() == "log"
        assert lines(axes)["norm lens"][1].tolist() == [100, 8, 1]

    def test_an_answer_that_is_always_on_top_leaves_a_labelled_axis(self):
        figure = rank_figure({"norm": answered("a", ranks=(1, 1, 1))})
        figure.draw_without_rendering()
        ticks = {label.get_text() for label in figure.axes[0].get_yticklabels()}
        assert {"1", "10"} <= ticks and figure.axes[0].get_ylim()[1] > 10

    def test_positions_before_the_last_have_no_rank(self):
        records = [*answered("a"), record(prompt_id="a", position=-1)]
        assert lines(rank_figure({"norm": records}).axes[0])["norm lens"][1].tolist() == [100, 8, 1]

    def test_the_calibrated_norm_lens_is_drawn_where_it_is_known(self, lenses):
        drawn = lines(kl_figure(lenses, calibrated=[2.5, 0.5, 0]).axes[0])
        assert [of.tolist() for of in drawn["norm lens, calibrated"]] == [[0, 1, 2], [2.5, 0.5, 0]]
        assert len(lines(kl_figure(lenses).axes[0])) == 2

    def test_lenses_differ_in_more_than_colour(self, lenses):
        drawn = kl_figure(lenses, calibrated=[2.5, 0.5, 0]).axes[0].get_lines()
        assert len({line.get_linestyle() for line in drawn}) == len({line.get_marker() for line in drawn}) == 3

    @pytest.mark.parametrize("layers", [1, 4, 80])
    def test_ticks_are_layers(self, layers):
        figure = kl_figure({"norm": made_up("norm", layers=layers)})
        figure.draw_without_rendering()
        ticks = figure.axes[-1].get_xticks()
        assert all(tick == round(tick) for tick in ticks) and len(ticks) <= 14


class TestCrossings:
    def test_median_over_prompts(self):
        records = [r for name, le_10 in (("a", 3), ("b", 1), ("c", 6)) for r in answered(name, le_10=le_10)]
        assert median_crossing(records, 10) == 3

    def test_a_prompt_that_never_gets_there_is_later_than_all(self):
        records = [r for name, le_5 in (("a", 3), ("b", None), ("c", 6)) for r in answered(name, le_5=le_5)]
        assert median_crossing(records, 5) == 6
        assert median_crossing([*records, *answered("d"), *answered("e")], 5) is None

    def test_prompts_without_an_answer_do_not_count(self):
        records = [*answered("a", le_1=2), record(prompt_id="b"), record(prompt_id="c")]
        assert median_crossing(records, 1) == 2
        assert median_crossing([record()], 1) is None

    def test_marks_lie_at_the_crossings(self):
        norm = answered("a", le_10=1, le_5=2, le_1=2) + answered("b", le_10=2, le_5=2)
        tuned = answered("a", "tuned", le_10=0, le_5=1, le_1=2) + answered("b", "tuned", le_10=1, le_5=1, le_1=2)
        strip, main = kl_figure({"norm": norm, "tuned": tuned}).axes
        rows = [label.get_text() for label in strip.get_yticklabels()]
        assert rows == ["answer in top 10", "answer in top 5", "answer in top 1"]
        marks = {(line.get_color(), round(line.get_ydata()[0])): line.get_xdata()[0] for line in strip.get_lines()}
        norm_colour, tuned_colour = (lines_of(main, label).get_color() for label in ("norm lens", "tuned lens"))
        assert marks == {
            (norm_colour, 0): 1.5, (norm_colour, 1): 2,
            (tuned_colour, 0): 0.5, (tuned_colour, 1): 1, (tuned_colour, 2): 2,
        }  # fmt: skip
        upright = [line.get_xdata()[0] for line in main.get_lines() if line.get_label().startswith("_")]
        assert sorted(upright) == sorted(marks.values())

    def test_marks_of_one_layer_do_not_cover_each_other(self):
        both = {lens: answered("a", lens, le_10=1, le_5=1, le_1=1) for lens in ("norm", "tuned")}
        strip = kl_figure(both).axes[0]
        heights = sorted(line.get_ydata()[0] for line in strip.get_lines())
        assert min(np.diff(heights)) > 0.3

    def test_a_milestone_that_no_lens_reaches_says_so(self):
        strip = kl_figure({"norm": answered("a", le_10=1)}).axes[0]
        assert [text.get_text() for text in strip.texts] == ["not in most of the prompts"] * 2

    def test_without_answers_there_are_none(self, lenses):
        assert len(kl_figure(lenses).axes) == 1


def lines_of(axes, label):
    return next(line for line in axes.get_lines() if line.get_label() == label)


class TestGain:
    def test_percentiles_of_the_difference_position_by_position(self, lenses):
        (axes,) = delta_kl_figure(lenses).axes
        # layer 0: 0, 0.5, 1, 2, 2.5; layer 1: 0, 0, 0, -1, 1; not the difference of medians
        assert lines(axes)["median"][1].tolist() == [1, 0, 0]
        wide, narrow = (band(collection) for collection in axes.collections)
        assert narrow == {0: (0.5, 2), 1: (0, 0), 2: (0, 0)}
        assert wide[0] == pytest.approx((0.2, 2.3)) and wide[1] == pytest.approx((-0.6, 0.6))

    def test_records_in_another_order_are_matched(self, lenses):
        shuffled = lenses | {"tuned": lenses["tuned"][::-1]}
        assert lines(delta_kl_figure(shuffled).axes[0])["median"][1].tolist() == [1, 0, 0]

    @pytest.mark.parametrize("layers", [4, 12])
    def test_thresholds_stand_at_the_gates_depths(self, layers):
        figure = delta_kl_figure({lens: made_up(lens, layers=layers) for lens in ("norm", "tuned")})
        drawn = lines(figure.axes[0])
        depths = [layer_at_depth(percent, layers) for percent in (25, 50, 75)]
        for label, bits in (("gate A: median at least", [0.2, 0.3, 0.3]), ("gate D: never below", [-0.1] * 3)):
            assert drawn[label][0].tolist() == depths and drawn[label][1].tolist() == bits
        upper = figure.axes[0].child_axes[0]
        names = ["25% depth", "50% depth", "75% depth"]
        assert [label.get_text() for label in upper.get_xticklabels()] == names
        assert upper.get_xticks().tolist() == sorted(set(depths))

    def test_one_lens_alone_is_an_error(self, lenses):
        with pytest.raises(ValueError, match="no records of the tuned lens"):
            delta_kl_figure({"norm": lenses["norm"]})

    def test_other_positions_are_an_error(self, lenses):
        with pytest.raises(ValueError, match="prompt 'capital', layer 2, position 4 is in the records of one lens"):
            delta_kl_figure(lenses | {"tuned": lenses["tuned"][:-1]})


class TestOverview:
    def test_has_all_four(self):
        figure = overview_figure({lens: made_up(lens) for lens in ("norm", "tuned")}, "a model")
        labels = [axes.get_ylabel() for axes in figure.axes]
        assert figure.get_suptitle() == "a model"
        assert sum("bits" in label for label in labels) == 2
        assert sum("rank" in label for label in labels) == sum("cosine" in label for label in labels) == 1

    def test_says_what_the_records_lack(self, lenses):
        figure = overview_figure({"norm": lenses["norm"]})
        notes = {text.get_text() for axes in figure.axes for text in axes.texts}
        assert notes == {"no prompt has an answer", "records of the norm lens alone"}

    @pytest.mark.parametrize("layers", [4, 80])
    def test_no_text_covers_another(self, layers, monkeypatch):
        figure = overview_figure({lens: made_up(lens, layers=layers) for lens in ("norm", "tuned")}, "a model")
        assert no_text_covers_another(figure, monkeypatch) > 40


def test_no_answers_are_an_error_of_the_rank_figure(lenses):
    with pytest.raises(ValueError, match="no prompt of these records has an answer"):
        rank_figure(lenses)


def test_a_title_is_no_formula(lenses):
    figure = kl_figure(lenses, "costs $x^{$")
    figure.draw_without_rendering()
    assert figure.get_suptitle() == "costs $x^{$"


def test_pyplot_is_not_touched(lenses):
    sys.modules.pop("matplotlib.pyplot", None)
    kl_figure(lenses).draw_without_rendering()
    assert "matplotlib.pyplot" not in sys.modules


def test_matplotlib_is_named_where_it_is_missing(lenses, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r'pip install "consistency-lens\[plots\]"'):
        kl_figure(lenses)
