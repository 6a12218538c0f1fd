"""Plots of a run: what is drawn is what its files say, under labels with units."""

import functools
import json
import sys

import pytest
from drawn_texts import no_text_covers_another
from report_documents import made_up_text_length

from consistency_lens import plots
from consistency_lens.plots.chart import GREY, STYLES
from consistency_lens.report.explorer_file import EXPLORER_FILE, read_explorer
from consistency_lens.report.profiles import profiles

# Okabe and Ito (2008), and the grey of what is not compared
COLOUR_BLIND_SAFE = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", GREY}
ALL = {
    "curves": plots.training_curves, "controls": plots.controls, "tokens": plots.fve_against_tokens,
    "best": plots.best_of_n_texts, "profiles": plots.token_profiles,
}  # fmt: skip


@pytest.fixture(scope="module")
def draw(run):
    """(name in `ALL`, interactive) -> the plot of the run, each drawn once."""
    return functools.cache(lambda name, interactive=False: ALL[name](run, interactive=interactive))


def lines(axes):
    """label -> (x, y) of the lines that the legend names."""
    handles, labels = axes.get_legend_handles_labels()
    return {label: tuple(map(list, handle.get_data())) for handle, label in zip(handles, labels, strict=True)}


def traces(figure, name):
    """(x, y) of the plotly traces of a name."""
    return [(list(trace.x), list(trace.y)) for trace in figure.data if trace.name == name]


def axes_of(figure, title):
    return next(axes for axes in figure.axes if axes.get_title().startswith(title))


def logged(run, name):
    log = json.loads((run / "log_history.json").read_text())
    return [entry["step"] for entry in log if name in entry], [entry[name] for entry in log if name in entry]


class TestTrainingCurves:
    def test_every_loss_that_was_logged_is_a_line_with_its_unit(self, draw, run):
        figure = draw("curves")
        error, entropy = (axes_of(figure, title) for title in ("Squared error", "Cross-entropy"))
        assert lines(error)["the lens's own text"] == logged(run, "mse_own_text")
        assert lines(entropy) == {"decoder": logged(run, "ce")}
        assert entropy.get_ylabel() == "nats a token" and entropy.get_xlabel() == "step"
        assert lines(axes_of(figure, "Learning rate"))["encoder"] == logged(run, "learning_rate_encoder_base")
        assert figure.get_suptitle() == "Training of tiny_stories, layer 2, in words"

    def test_stages_are_marked_where_they_begin(self, draw, run):
        steps, stage = logged(run, "stage")
        begins = max(step for step, of in zip(steps, stage, strict=True) if of == 1)
        for axes in draw("curves").axes:
            marks = [(text.get_text(), text.xy[0]) for text in axes.texts]
            assert marks == [("warm start", 0), ("policy gradient", begins)]
        shown = draw("curves", True).layout.annotations
        assert {note.x for note in shown if note.text == "policy gradient"} == {begins}

    def test_plotly_draws_the_same(self, draw, run):
        figure = draw("curves", True)
        assert traces(figure, "the lens&#x27;s own text") == [logged(run, "mse_own_text")]
        assert "nats a token" in {axis.title.text for axis in figure.select_yaxes()}

    def test_held_out_figures_come_first_where_they_were_measured(self, tmp_path):
        log = [{"step": step, "eval_fve": step / 10, "eval_kl_recovered": step / 8, "stage": 1} for step in (1, 2, 3)]
        (tmp_path / "log_history.json").write_text(json.dumps(log))
        (axes,) = plots.training_curves(tmp_path).axes
        assert axes.get_title() == "Held-out rows" and axes.get_ylabel() == "share: 1 is perfect, 0 the mean"
        assert lines(axes) == {"FVE": ([1, 2, 3], [0.1, 0.2, 0.3]), "KL recovered": ([1, 2, 3], [0.125, 0.25, 0.375])}

    def test_one_panel(self, run):
        (axes,) = plots.training_curves(run, only=["KL"]).axes
        assert lines(axes) == {"text to its reference": logged(run, "lm")}

    def test_a_panel_that_is_not_there_is_an_error(self, run):
        with pytest.raises(ValueError, match="nothing for 'held-out rows'; it has squared error"):
            plots.training_curves(run, only=["held-out rows"])

    def test_a_run_without_a_log_is_an_error(self, tmp_path):
        (tmp_path / "metrics.json").write_text("{}")
        with pytest.raises(ValueError, match="no curves in .* pass the output_dir of a training"):
            plots.training_curves(tmp_path)


class TestControls:
    def test_the_lens_stands_among_its_controls_by_fve(self, draw, metrics):
        left, right = draw("controls").axes
        worth = {"the lens's text": metrics} | {name.replace("_", " "): of for name, of in metrics["controls"].items()}
        expected = sorted(worth, key=lambda name: worth[name]["fve"], reverse=True)
        labels = left.get_yticklabels()
        assert [label.get_text() for label in labels] == expected
        assert [label.get_text() for label in labels if label.get_fontweight() == "bold"] == ["the lens's text"]
        for axes, name in ((left, "fve"), (right, "kl_recovered")):
            values = [f"{worth[label][name]:.3f}".replace("-", "−") for label in expected]
            assert [text.get_text().removeprefix(" ◂ ") for text in axes.texts] == values
        assert left.get_title() == "FVE" and right.get_title() == "KL recovered"
        assert left.get_xlabel() == right.get_xlabel() == "1 is perfect, 0 the mean activation"
        assert draw("controls").get_supxlabel().startswith("bars: 95% intervals by bootstrap over documents")

    def test_intervals_are_those_of_the_evaluation(self, draw, metrics):
        left, right = draw("controls").axes
        drawn = [tuple(line.get_xdata()) for line in left.get_lines() if line.get_marker() == "|"]
        assert tuple(metrics["ci95"]["fve"]) in drawn and tuple(metrics["ci95"]["controls.context_tail.fve"]) in drawn
        drawn = [tuple(line.get_xdata()) for line in right.get_lines() if line.get_marker() == "|"]
        assert tuple(metrics["ci95"]["kl_recovered"]) in drawn

    def test_what_lies_far_below_zero_is_named_at_the_edge(self, draw):
        left, _ = draw("controls").axes
        assert left.get_xlim()[0] == -1 and left.texts[-1].get_text().startswith(" ◂ −4.750")
        last = [trace for trace in draw("controls", True).data if trace.xaxis == "x"][-1]
        assert last.mode == "text" and last.x == (-1,) and last.y == ("empty text",)

    def test_plotly_draws_the_same(self, draw, metrics):
        drawn = draw("controls", True).data
        (trace,) = [trace for trace in drawn if trace.y[0] == "context tail" and trace.xaxis == "x"]
        value, interval = metrics["controls"]["context_tail"]["fve"], metrics["ci95"]["controls.context_tail.fve"]
        ends = value - trace.error_x.arrayminus[0], value + trace.error_x.array[0]
        assert trace.x == (value,) and ends == pytest.approx(tuple(interval))

    def test_a_run_that_was_not_evaluated_is_an_error(self, tmp_path):
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(ValueError, match="controls: no figures in .*; run consistency-lens eval"):
            plots.controls(tmp_path)


def of_length(folder, tokens, fve):
    """A folder with the figures of a lens of T = tokens."""
    folder.mkdir()
    metrics = {
        "fve": fve, "kl_recovered": fve + 0.1, "ci95": {"fve": [fve - 0.1, fve + 0.2]}, "rows": 9, "documents": 3,
        "controls": {"context_tail": {"fve": fve + 0.3, "kl_recovered": 0.9}},
        "arguments": {"recipe": {"num_text_tokens": tokens, "model": "m", "layer": 1}},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


class TestTokens:
    def test_one_lens_is_read_in_part(self, run, metrics):
        left, right = plots.fve_against_tokens(run).axes
        length = made_up_text_length()
        for axes, name in ((left, "fve"), (right, "kl_recovered")):
            drawn = lines(axes)
            assert drawn["first tokens of the lens's text"] == ([1, 2, 3], length["first"][name])
            assert drawn["last tokens of the lens's text"] == ([1, 2, 3], length["last"][name])
            assert drawn["true last tokens of the context"] == ([1, 2, 3], length["context_tail"][name])
            assert drawn["current token alone"][1][0] == metrics["controls"]["current_token_only"][name]
            band = axes.collections[0].get_paths()[0].vertices
            assert {tuple(sorted(set(band[band[:, 0] == x, 1]))) for x in (1, 2, 3)} == {
                tuple(interval) for interval in length["first"][f"{name}_ci95"]
            }
        assert left.get_title() == "FVE (1 is perfect, 0 the mean activation)" and left.get_ylabel() == "FVE"
        assert left.get_xlabel() == "tokens that the encoder reads"
        assert [label.get_text() for label in left.get_xticklabels()] == ["1", "2", "3"]

    def test_several_lenses_stand_at_their_own_lengths(self, tmp_path):
        runs = [of_length(tmp_path / f"t{tokens}", tokens, fve) for tokens, fve in ((32, 0.6), (2, 0.3), (8, 0.5))]
        left, right = plots.fve_against_tokens(*runs).axes
        assert lines(left)["lens's text"] == ([2, 8, 32], [0.3, 0.5, 0.6])
        assert lines(left)["true end of the context"][1] == pytest.approx([0.6, 0.8, 0.9])
        assert lines(right)["lens's text"][1] == pytest.approx([0.4, 0.6, 0.7])
        assert left.get_xscale() == "log" and left.get_xlabel() == "text tokens T"
        (first, *_) = traces(plots.fve_against_tokens(*runs, interactive=True), "lens&#x27;s text")
        assert first == ([2, 8, 32], [0.3, 0.5, 0.6])

    def test_errors_say_how_to_mend_them(self, tmp_path):
        one = of_length(tmp_path / "one", 4, 0.5)
        other = of_length(tmp_path / "other", None, 0.5)
        with pytest.raises(ValueError, match="without the check text_length; run consistency-lens eval --checks"):
            plots.fve_against_tokens(one)
        with pytest.raises(ValueError, match="does not say its num_text_tokens; leave it out"):
            plots.fve_against_tokens(one, other)
        with pytest.raises(ValueError, match="got no run; pass the folder of one"):
            plots.fve_against_tokens()


def test_best_of_n(run, metrics, tmp_path):
    (axes,) = plots.best_of_n_texts(run).axes
    counts = [int(count) for count in metrics["best_of_n"]]
    assert lines(axes)["FVE"] == (counts, [of["fve"] for of in metrics["best_of_n"].values()])
    assert axes.get_xscale() == "log"
    with pytest.raises(ValueError, match="without the check best_of_n"):
        plots.best_of_n_texts(of_length(tmp_path / "run", 4, 0.5))


class TestProfiles:
    def test_groups_stand_with_their_intervals(self, run):
        groups = profiles(read_explorer(run / EXPLORER_FILE))
        figure = plots.token_profiles(run)
        positions, kinds = axes_of(figure, "FVE by position"), axes_of(figure, "KL by kind of token")
        names = [label.get_text() for label in positions.get_yticklabels()]
        assert names == [of["label"] for of in groups["position"]]
        dots = [line.get_xdata()[0] for line in kinds.get_lines() if line.get_marker() == "o"]
        assert dots == [of["values"]["kl"][0] for of in groups["token_class"]]
        assert kinds.get_xlabel() == "nats"

    def test_a_run_without_a_report_is_an_error(self, tmp_path):
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(ValueError, match="no explorer.json in .*; run consistency-lens report"):
            plots.token_profiles(tmp_path)


class TestAll:
    @pytest.mark.parametrize("name", ALL)
    def test_no_text_covers_another(self, name, draw, monkeypatch):
        assert no_text_covers_another(draw(name), monkeypatch) > 8

    @pytest.mark.parametrize("name", ALL)
    def test_colours_stay_apart_for_the_colour_blind(self, name, draw):
        figure = draw(name)
        colours = {line.get_color() for axes in figure.axes for line in axes.get_lines()}
        assert colours <= COLOUR_BLIND_SAFE | {"black"}
        shown = {trace.line.color or trace.marker.color or GREY for trace in draw(name, True).data}
        assert {of for of in shown} <= COLOUR_BLIND_SAFE

    def test_styles_differ_in_colour_and_marker(self):
        assert len({style.colour for style in STYLES}) == len({style.marker for style in STYLES}) == len(STYLES)
        assert {style.colour for style in STYLES} <= COLOUR_BLIND_SAFE

    @pytest.mark.parametrize("name", ALL)
    def test_a_missing_library_is_named_with_its_extra(self, name, run, monkeypatch):
        for package, interactive in (("matplotlib", False), ("plotly", True)):
            monkeypatch.setitem(sys.modules, package, None)
            with pytest.raises(ValueError, match=rf"needs the package '{package}'.*\"consistency-lens\[plots\]\""):
                ALL[name](run, interactive=interactive)

    @pytest.mark.parametrize("name", ALL)
    def test_no_run_is_an_error(self, name, tmp_path):
        with pytest.raises(ValueError, match="run: no folder at"):
            ALL[name](tmp_path / "nowhere")

    def test_a_notebook_shows_a_figure(self, draw):
        assert draw("controls")._repr_png_().startswith(b"\x89PNG")
