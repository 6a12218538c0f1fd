"""The document of a report, from what a real run has left."""

import copy
import functools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from report_documents import made_up_explorer, made_up_text_length

from consistency_lens.report.document import report_document
from consistency_lens.report.figures import comparison, text_length, verdict
from consistency_lens.report.run_folder import RunFolder, read_run

CARDS = Path(__file__).parents[2] / "model_cards" / "tiny_stories"


@pytest.fixture(scope="module")
def run():
    return read_run(CARDS)


@pytest.fixture(scope="module")
def document(run):
    return report_document(run, made_up_explorer(), notes=["made up"])


def test_says_what_was_read_and_on_what(run, document):
    assert document["title"] == "tiny_stories, layer 2, in words"
    assert "block 2 of examples/tiny_stories is put into 5 tokens" in document["lead"][0]
    assert f"{run.metrics['rows']:,} activations of {run.metrics['documents']:,} documents" in document["lead"][1]


def test_figures_have_their_intervals(run, document):
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert figures["fve"]["value"] == run.metrics["fve"]
    assert figures["fve"]["interval"] == run.metrics["ci95"]["fve"]
    assert figures["distinct_2"]["interval"] is None


def test_every_control_stands_beside_the_lens(run, document):
    lens, *controls = document["comparison"]
    assert lens["fve"] == run.metrics["fve"]
    assert [control["name"] for control in controls] == list(run.metrics["controls"])
    assert all(control["interval"] and control["meaning"] for control in controls)
    assert controls[-1]["meaning"].endswith("55 bits")


def test_the_verdict_is_that_of_the_intervals(document):
    lens, *controls = document["comparison"]
    low, high = lens["interval"]
    sides = document["verdict"]
    assert sides["above"] and sides["above"] == by_fve(of for of in controls if of["interval"][1] < low)
    assert sides["below"] == by_fve(of for of in controls if of["interval"][0] > high)
    assert sum(map(len, sides.values())) == len(controls)


def by_fve(controls):
    return [of["label"] for of in sorted(controls, key=lambda of: of["fve"], reverse=True)]


def test_overlapping_intervals_are_level():
    metrics = {
        "fve": 0.5, "controls": {"mean": {"fve": 0.45, "kl_recovered": 0}, "shuffled": {"fve": 0.1}},
        "ci95": {"fve": [0.4, 0.6], "controls.mean.fve": [0.42, 0.48], "controls.mean.kl_recovered": [0, 0.1]},
    }  # fmt: skip
    assert [of["kl_interval"] for of in comparison(metrics)] == [None, [0, 0.1], None]
    assert verdict(comparison(metrics)) == {"above": ["shuffled"], "level": ["mean"], "below": []}


def test_checks(run, document):
    assert [of["n"] for of in document["best_of_n"]] == [1, 2, 4, 8, 16]
    fresh = next(reader for reader in document["readers"] if reader["name"] == "fresh_encoder")
    assert fresh["fve"] == run.metrics["private_code"]["fresh_encoder"]["fve"]
    assert document["linear_probe"][1]["text"] == run.metrics["linear_probe"]["named_by_text"][1]
    made = [name for name in ("best_of_n", "text_length", "private_code", "linear_probe") if name in run.metrics]
    assert len(made) >= 3 and len(document["tables"]) == len(made)


def test_what_part_of_a_text_is_worth():
    made_up = made_up_text_length()
    first, *_, tail = text_length({"text_length": made_up})
    assert first["label"] == "first tokens of the lens's text" and first["tokens"] == [1, 2, 3]
    assert first["fve"] == made_up["first"]["fve"] and first["intervals"] == made_up["first"]["fve_ci95"]
    assert tail["kl_recovered"] == made_up["context_tail"]["kl_recovered"]
    assert tail["kl_intervals"] == made_up["context_tail"]["kl_recovered_ci95"]
    assert text_length({"fve": 0.5}) == []


def test_provenance(document):
    assert ["subject", "examples/tiny_stories"] in document["provenance"]


def test_what_is_not_there_is_noted(tmp_path):
    shutil.copy(CARDS / "metrics.json", tmp_path)
    notes = report_document(read_run(tmp_path), None, notes=["made up"])["notes"]
    assert notes[0] == "made up" and any(note.startswith("No log_history.json") for note in notes)


def test_a_run_that_has_almost_nothing(tmp_path):
    document = report_document(RunFolder(path=tmp_path / "mine", log=[{"step": 1, "ce": 1.0}, {"step": 2, "ce": 0.5}]))
    assert document["title"] == "The lens in mine" and len(document["curves"]["charts"]) == 1
    for part in ("lead", "figures", "comparison", "examples", "readers", "tables"):
        assert document[part] == []
    assert document["explorer"] is None and document["cases"] is None and document["verdict"] == {}


def places_below(content, place=()):
    """The place of every key in nested objects."""
    for key, value in content.items() if isinstance(content, dict) else ():
        yield (*place, key)
        yield from places_below(value, (*place, key))


def without(content, place):
    """A copy that lacks the key at a place."""
    content = copy.deepcopy(content)
    functools.reduce(lambda of, key: of[key], place[:-1], content).pop(place[-1])
    return content


def test_whatever_key_a_file_lacks_there_is_a_report(run):
    for name in ("metrics", "run", "provenance"):
        whole = getattr(run, name)
        for place in places_below(whole):
            assert report_document(replace(run, **{name: without(whole, place)}))["figures"], place


def test_parts_that_cannot_be_made_are_left_out_and_named(run, document):
    assert document["notes"] == ["made up"]
    metrics = without(run.metrics, ("private_code", "fresh_encoder", "share_of_fve"))
    lacking = report_document(replace(run, metrics=metrics))
    assert lacking["tables"] == [] and lacking["readers"] == document["readers"]
    assert lacking["notes"] == [
        "Without tables of checks: metrics.json is not as this version writes it (has no 'share_of_fve' there); make "
        "it anew."
    ]
    rows = [without(run.samples[0], ("explanation",)), {**run.samples[1], "fve": None}]
    for row in rows:
        lacking = report_document(replace(run, samples=[row]))
        assert lacking["examples"] == [] and lacking["notes"][0].startswith("Without samples: samples.jsonl is not")
