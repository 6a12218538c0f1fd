"""Plots of tuned lenses, where they are more than the figures of `tuned-lens plot`."""

import json
import math
import sys

import numpy as np
import pytest
from sweep_records import made_up, record, write_csv

from consistency_lens import plots
from consistency_lens.tuned_lens.plots import LENSES

LENS = "model_cards/tuned_lens_tiny_stories"


@pytest.fixture(scope="module")
def records():
    return {lens: made_up(lens) for lens in ("norm", "tuned")}


@pytest.fixture(scope="module")
def sweep(records, tmp_path_factory):
    """The folder of a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    for lens, ending in (("norm", ""), ("tuned", "-tuned")):
        write_csv(folder / f"gpt2-records{ending}.csv", records[lens])
    (folder / "gpt2.json").write_text(json.dumps({"model_id": "openai/gpt2"}))
    return folder


@pytest.fixture
def fitted(tmp_path, request):
    """What a fit leaves, but its weights."""
    cards = request.config.rootpath / LENS
    for name in ("config.json", "metrics.json"):
        (tmp_path / name).write_text((cards / name).read_text())
    return tmp_path


def medians(records, column):
    layers = sorted({of.layer for of in records})
    return [np.median([getattr(of, column) for of in records if of.layer == layer]) for layer in layers]


def traces(figure):
    """(panel's axis, label) -> y."""
    return {(trace.yaxis, trace.name): list(trace.y) for trace in figure.data if trace.name}


class TestDepth:
    @pytest.mark.parametrize(
        ("quantity", "label"), [("kl", "bits"), ("rank", "rank"), ("cos", "cosine"), ("gain", "bits")]
    )
    def test_one_quantity_of_a_folder(self, sweep, quantity, label):
        figure = plots.depth(sweep, quantity)
        assert figure.get_suptitle() == "openai/gpt2" and label in figure.axes[-1].get_ylabel()
        plotly = plots.depth(sweep, quantity, interactive=True)
        assert plotly.layout.title.text == "openai/gpt2" and label in plotly.layout.yaxis.title.text

    def test_all_of_them(self, records):
        assert len(plots.depth(records).axes) >= 5
        figure = plots.depth(records, interactive=True)
        titles = [note.text for note in figure.layout.annotations]
        assert len(titles) == 4 and titles[0] == "KL to the final prediction"
        drawn = traces(figure)
        assert drawn["y", "tuned lens"] == pytest.approx(medians(records["tuned"], "kl_from_final_bits"))
        assert drawn["y3", "norm lens"] == pytest.approx(medians(records["norm"], "cos_to_final"))

    def test_plotly_draws_the_lenses_as_matplotlib_does(self, records):
        drawn = plots.depth(records, "kl", interactive=True).data
        colours = {trace.name: trace.line.color for trace in drawn if trace.name}
        assert colours == {style.label: style.colour for style in LENSES.values()}

    def test_what_records_lack_is_left_out_of_all_and_an_error_alone(self):
        norm = {"norm": made_up("norm", answers=False)}
        assert len(plots.depth(norm, interactive=True).layout.annotations) == 2
        for interactive in (False, True):
            with pytest.raises(ValueError, match="no prompt of these records has an answer"):
                plots.depth(norm, "rank", interactive=interactive)
            with pytest.raises(ValueError, match="no records of the tuned lens"):
                plots.depth(norm, "gain", interactive=interactive)

    def test_a_fit_has_its_kl_on_held_out_text(self, fitted):
        kl = json.loads((fitted / "metrics.json").read_text())["kl"]
        (axes,) = plots.depth(fitted).axes
        handles, labels = axes.get_legend_handles_labels()
        drawn = {label: list(handle.get_ydata()) for handle, label in zip(handles, labels, strict=True)}
        assert drawn["tuned lens"] == pytest.approx([nats / math.log(2) for nats in kl["tuned"]])
        assert set(drawn) == {"norm lens", "norm lens, calibrated", "tuned lens"} and "bits" in axes.get_ylabel()
        with pytest.raises(ValueError, match="a fit leaves the KL alone, .* pass the folder of a sweep"):
            plots.depth(fitted, "rank")

    def test_mistakes(self, records, tmp_path):
        with pytest.raises(ValueError, match="quantity must be one of all, kl, rank, cos, gain, got 'entropy'"):
            plots.depth(records, "entropy")
        with pytest.raises(ValueError, match="records: no "):
            plots.depth(tmp_path)


class TestHeatmap:
    def test_the_first_prompt_of_a_folder(self, sweep):
        assert plots.heatmap(sweep).get_suptitle() == "openai/gpt2, prompt prompt-0"

    @pytest.mark.parametrize("quantity", ["kl", "entropy", "probability"])
    def test_plotly_has_a_cell_for_each_layer_and_token(self, records, quantity):
        norm, tuned = plots.heatmap(records, "prompt-1", quantity, interactive=True).data
        cells = {(of.layer, of.position): of for of in records["tuned"] if of.prompt_id == "prompt-1"}
        value = {"kl": "kl_from_final_bits", "entropy": "entropy_bits"}.get(quantity)
        for (layer, position), of in cells.items():
            assert tuned.z[layer][position] == (of.top20[0][2] if value is None else getattr(of, value))
            assert f"KL {of.kl_from_final_bits:.2f} bits" in tuned.customdata[layer][position]
        assert norm.customdata != tuned.customdata and norm.coloraxis == tuned.coloraxis == "coloraxis"

    def test_the_answer_is_bold_and_tokens_are_no_html(self):
        records = {"norm": [record(token="<b>", top20=[[1, "<i>", 0.5]], is_answer=True, answer="<i>")]}
        figure = plots.heatmap(records, interactive=True)
        assert figure.data[0].text[0] == ["<b>&lt;i&gt;</b>"]
        assert figure.layout.xaxis.ticktext == ("&lt;b&gt;",) and "<i>" not in figure.data[0].customdata[0][0]

    def test_mistakes(self, records):
        for interactive in (False, True):
            with pytest.raises(ValueError, match="no records of 'nobody'"):
                plots.heatmap(records, "nobody", interactive=interactive)
        with pytest.raises(ValueError, match="quantity must be one of kl, entropy, probability, got 'rank'"):
            plots.heatmap(records, quantity="rank", interactive=True)


@pytest.mark.parametrize("plot", [plots.depth, plots.heatmap])
@pytest.mark.parametrize(("package", "interactive"), [("matplotlib", False), ("plotly", True)])
def test_a_missing_library_is_named_with_its_extra(plot, package, interactive, records, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package '{package}'.*\"consistency-lens\[plots\]\""):
        plot(records, interactive=interactive)
