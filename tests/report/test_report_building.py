"""From a run's folder to its page: which texts are read with which lens, and what is said where there is none."""

import json
import logging
import os

import pytest
from report_documents import made_up_explorer
from tiny_lenses import LAYER, PROMPTS, disturb, tiny_lens, tiny_tokenizer
from tiny_models import tiny_model
from tiny_tuned_lenses import tiny_tuned_lens
from transformers import AutoModelForCausalLM

from consistency_lens import ConsistencyLensModel
from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.fingerprints import weights_hash
from consistency_lens.report import building
from consistency_lens.report.building import ReportArguments, build_report
from consistency_lens.report.explorer_file import read_explorer, weights_sha256, write_explorer
from consistency_lens.report.texts import documents_of, texts_of_file

METRICS = {"fve": 0.5, "rows": 8, "documents": 4, "ci95": {}, "controls": {}}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(subject, tmp_path):
    """A run's folder with figures and a lens, without the data of its training."""
    model = AutoModelForCausalLM.from_pretrained(subject)
    lens = ConsistencyLensModel.from_subject(model, tiny_tokenizer(), LAYER, num_text_tokens=3, **PROMPTS)
    disturb(lens).save_pretrained(tmp_path / "run")
    recipe = {"model": str(subject), "layer": LAYER, "num_text_tokens": 3}
    metrics = {**METRICS, "arguments": {"recipe": recipe}}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path / "run"


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "w9 w10 w11"}\n\n{"text": "w20 w21", "more": 1}\n')
    return tmp_path / "texts.jsonl"


@pytest.fixture
def no_model(monkeypatch):
    """An error where a lens is loaded."""

    def load(*_):
        raise AssertionError("a lens was loaded")

    monkeypatch.setattr(building, "load_lens", load)


def build(run, **arguments):
    return build_report(ReportArguments(run=str(run), device="cpu", **arguments))


class TestTexts:
    def test_of_a_file_are_read_by_the_runs_lens(self, run, texts):
        path, document = build(run, texts=str(texts), max_tokens=4)
        assert path == run / "report.html" and path.read_text().startswith("<!DOCTYPE html>")
        explorer = document["explorer"]
        assert [text["title"] for text in explorer["texts"]] == ["w9 w10 w11", "w20 w21"]
        assert [len(text["tokens"]) for text in explorer["texts"]] == [3, 1]
        assert explorer["source"] == "Texts of texts.jsonl" and explorer["lens"] == weights_sha256(run)
        assert not (run / "explorer.json").exists()

    def test_of_a_plain_file_are_its_documents(self, tmp_path):
        (tmp_path / "texts.txt").write_text("w9 w10\n<|endoftext|>\nw11")
        assert [ids for _, ids in texts_of_file(tiny_lens(), tmp_path / "texts.txt")] == [[1, 9, 10], [1, 11]]

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            ("", "holds no text"),
            ('{"text": 7}', "line 1 of .* has no 'text'"),
            ("{}\n{", "line 1"),
            ("{", "is no JSON"),
        ],
    )
    def test_of_a_broken_file_are_refused(self, tmp_path, content, told):
        (tmp_path / "texts.jsonl").write_text(content)
        with pytest.raises(ValueError, match=f"texts: .*{told}"):
            list(texts_of_file(tiny_lens(), tmp_path / "texts.jsonl"))

    def test_of_no_file(self, run):
        with pytest.raises(ValueError, match=r"texts: no file at .*nowhere.jsonl"):
            build(run, texts=str(run / "nowhere.jsonl"))

    def test_that_were_read_before_need_no_model(self, run, no_model):
        kept = {**made_up_explorer(texts=1, tokens=6), "lens": weights_sha256(run)}
        write_explorer(run / "explorer.json", kept)
        assert build(run)[1]["explorer"] == kept
        assert build(run, max_tokens=6)[1]["explorer"] == kept

    @pytest.mark.parametrize(
        ("kept", "changes"),
        [({"lens": "0" * 64}, {}), ({}, {"max_tokens": 7}), ({"ablation": False}, {}), ({}, {"seed": 0})],
    )
    def test_that_were_read_otherwise_are_read_anew(self, run, monkeypatch, kept, changes):
        old = {**made_up_explorer(texts=1, tokens=6), "lens": weights_sha256(run), **kept}
        write_explorer(run / "explorer.json", old)
        other = {**made_up_explorer(texts=2, tokens=7), "lens": weights_sha256(run)}
        monkeypatch.setattr(building, "read_with_lens", lambda *_: other)
        assert build(run, **changes)[1]["explorer"] == other
        assert read_explorer(run / "explorer.json") == other

    def test_of_a_subject_that_was_not_compared_are_nothing_of_the_run(self, run, texts, tmp_path):
        subject = ConsistencyLensModel.from_pretrained(run).subject.model
        (run / "provenance.json").write_text(json.dumps({"cache": {"weights_hash": weights_hash(subject)}}))
        tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
        asked = {"model": str(tmp_path / "other"), "dtype": "bfloat16"}
        page = {"output": str(tmp_path / "page.html")}
        for changes in ({}, {"texts": str(texts)}, {"lens": str(run)}, page):
            with pytest.raises(ValueError, match="load it in float32, or pass --texts and --output$"):
                build(run, **asked, **changes)
        assert not (run / "explorer.json").exists() and not (run / "report.html").exists()
        assert len(build(run, **asked, **page, texts=str(texts))[1]["explorer"]["texts"]) == 2

    def test_that_cannot_be_had_are_missing_from_the_page(self, run):
        path, document = build(run)
        assert document["explorer"] is None and document["figures"]
        assert document["notes"][0].startswith("No explorer: ") and path.is_file()

    def test_need_a_lens(self, run, no_model):
        os.remove(run / "config.json")
        assert "this folder holds no lens" in build(run)[1]["notes"][0]

    def test_that_were_asked_for_are_an_error_where_they_cannot_be_had(self, run, texts):
        with pytest.raises(ValueError, match="lens: cannot load '.*nowhere'"):
            build(run, lens=str(run / "nowhere"), texts=str(texts))

    def test_that_were_broken_are_told(self, run):
        (run / "explorer.json").write_text("{}")
        with pytest.raises(ValueError, match="explorer: .* is no explorer; remove it"):
            build(run)


class TestHeldOutDocuments:
    def test_are_each_read_once_as_far_as_they_are_known(self):
        rows = [{"document": 1, "input_ids": [1, 5]}, {"document": 1, "input_ids": [1, 5, 6]}]
        rows.append({"document": 2, "input_ids": [1, 7]})
        assert sorted(documents_of(rows, seed=0)) == [[1, 5, 6], [1, 7]]

    def test_of_a_cache_agree_with_those_of_rows(self, tmp_path):
        from lens_runs import tiny_cache

        cache = tiny_cache(tmp_path / "cache")[2]
        assert isinstance(cache, ActivationCache)
        rows = ActivationRows(cache)
        found, again = (list(documents_of(rows, seed)) for seed in (0, 0))
        assert found == again != list(documents_of(rows, 1))
        assert sorted(found) == sorted(documents_of([rows[index] for index in range(len(rows))], 0))


class TestTunedLens:
    @pytest.fixture
    def tuned(self, subject, tmp_path):
        lens = tiny_tuned_lens()
        lens.config.base_model_name_or_path = str(subject)
        lens.save_pretrained(tmp_path / "tuned_lenses" / subject.name)
        return tmp_path / "tuned_lenses" / subject.name

    def test_that_lies_beside_the_run_is_shown(self, run, tuned, texts):
        heatmap = build(run, texts=str(texts))[1]["heatmap"]
        assert list(heatmap["lenses"]) == ["norm", "tuned"] == list(heatmap["labels"])
        assert [len(layer) for layer in heatmap["lenses"]["tuned"]] == [3, 3, 3]
        assert len(heatmap["lenses"]["tuned"][0][0]["top"]) == 10

    def test_without_a_text_is_told(self, run, tuned):
        document = build(run)[1]
        assert document["heatmap"] is None
        assert any(note.startswith("No heatmap of the tuned lens") for note in document["notes"])

    def test_that_was_asked_for_is_an_error_where_there_is_none(self, run, texts):
        with pytest.raises(ValueError, match="lens: no tuned lens at"):
            build(run, texts=str(texts), tuned_lens=str(run / "nowhere"))


def test_a_large_page_is_told(run, no_model, monkeypatch, caplog):
    write_explorer(run / "explorer.json", {**made_up_explorer(texts=1, tokens=6), "lens": weights_sha256(run)})
    monkeypatch.setattr(building, "LARGEST_PAGE", 1000)
    with caplog.at_level(logging.WARNING):
        build(run, output=str(run / "other" / "page.html"))
    assert "pass a smaller --max_tokens" in caplog.text and (run / "other" / "page.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({}, "run: got none"), ({"run": "x", "max_tokens": 0}, "max_tokens must be at least 1, got 0")],
)
def test_arguments(arguments, told):
    with pytest.raises(ValueError, match=told):
        ReportArguments(**arguments)


def test_the_page_is_no_folder(tmp_path):
    with pytest.raises(ValueError, match="output: .* is a folder"):
        ReportArguments(run="x", output=str(tmp_path))
