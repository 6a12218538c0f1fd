"""A sweep of a tiny model: its run JSON against its record files, with and without a tuned lens."""

import dataclasses
import json
import logging
import math
import statistics

import pytest
import torch
from tiny_lenses import tiny_tokenizer
from tiny_models import NUM_LAYERS, tiny_model
from tiny_tuned_lenses import tiny_tuned_lens

from consistency_lens.tuned_lens.readings import read_prompt
from consistency_lens.tuned_lens.records import read_records
from consistency_lens.tuned_lens.suite import CONTROL, FACTUAL, Prompt, suite_hash, tokenise_suite
from consistency_lens.tuned_lens.summaries import artifact_risk, diagnostics
from consistency_lens.tuned_lens.sweep import find_lens, judge_lens, sweep

SUITE = [
    Prompt("a", "w5 w9 w11 w40", "w23", FACTUAL),
    Prompt("b", "w7 w8", "w30 w31", FACTUAL),
    Prompt("c", "w3 w3 w3", None, CONTROL),
]
FILES = ["run-pure-next-token-tuned.csv", "run-pure-next-token.csv", "run-records-tuned.csv", "run-records.csv"]
QUICK = {"num_resamples": 20, "progress": False}


@pytest.fixture(scope="module")
def lens():
    lens = tiny_tuned_lens()
    lens.provenance = {"enabled": True, "seed": 316, "kpis": None, "acceptance": None}
    return lens


@pytest.fixture(scope="module")
def swept(lens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    run = sweep(lens, lens.subject_model, lens.tokenizer, SUITE, folder, "run", model_id="me/tiny", **QUICK)
    return folder, run


class TestRun:
    def test_leaves_its_json_and_four_record_files(self, swept):
        folder, run = swept
        assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "run.json"])
        assert json.loads((folder / "run.json").read_text()) == run
        assert run["model_id"] == "me/tiny" and run["num_layers"] == NUM_LAYERS
        assert run["suite"] == {"name": "default", "prompts": 3, "sha256": suite_hash(SUITE)}
        assert sorted(run["files"]) == sorted(FILES)

    def test_says_of_each_prompt_what_its_answer_became(self, swept):
        first, second, third = swept[1]["prompts"]
        assert (first["answer_id"], first["answer_token"], first["answer_is_one_token"]) == (23, "w23", True)
        assert (second["answer_id"], second["answer_token"], second["answer_is_one_token"]) == (30, "w30", False)
        assert (third["answer_id"], third["answer_is_one_token"], third["kind"]) == (None, None, "control")

    def test_has_the_milestones_of_the_records(self, swept):
        folder, run = swept
        records = read_records(folder / "run-pure-next-token-tuned.csv")
        for prompt in run["prompts"]:
            ranks = [record.answer_rank for record in records if record.prompt_id == prompt["id"]]
            for most in (10, 5, 1):
                reached = [layer for layer, rank in enumerate(ranks) if rank is not None and rank <= most]
                assert prompt["tuned"][f"first_rank_le_{most}"] == (reached[0] if reached else None)

    def test_has_the_medians_of_the_records(self, swept):
        folder, run = swept
        for name, file in (("norm", "run-records.csv"), ("tuned", "run-records-tuned.csv")):
            records = read_records(folder / file)
            for layer, figures in enumerate(run["layers"]):
                of = [record for record in records if record.layer == layer]
                for column in ("kl_from_final_bits", "entropy_bits", "cos_to_final"):
                    expected = statistics.median(getattr(record, column) for record in of)
                    assert figures[name][column] == pytest.approx(expected, abs=1e-5)
                ranks = [record.answer_rank for record in of if record.answer_rank is not None]
                assert figures[name]["answer_rank"] == statistics.median(ranks)
                assert figures[name]["share_of_answers_on_top"] == ranks.count(1) / 2

    def test_has_the_kpis_of_the_records(self, swept):
        folder, run = swept
        kpis = run["tuned_lens"]["kpis"]
        norm, tuned = (read_records(folder / f"run-records{ending}.csv") for ending in ("", "-tuned"))
        for index, layer in enumerate(kpis["layers@{25,50,75}%"]):
            deltas = [
                a.kl_from_final_bits - b.kl_from_final_bits
                for a, b in zip(norm, tuned, strict=True)
                if a.layer == b.layer == layer
            ]
            expected = statistics.median(deltas)
            assert kpis["median_delta_kl_bits@{25,50,75}%"][index] == pytest.approx(expected, abs=1e-5)
        assert (kpis["prompts"], kpis["prompts_with_answer"], kpis["positions"]) == (3, 2, 4 + 2 + 3)

    def test_the_tuned_lens_block_is_the_provenance_with_kpis_and_acceptance(self, swept):
        block = swept[1]["tuned_lens"]
        assert (block["enabled"], block["seed"]) == (True, 316)
        assert list(block["acceptance"]) == ["gate_A", "gate_B", "gate_C", "gate_D"]
        assert block["acceptance"]["gate_C"] is True
        assert block["kpis"]["suite"] == swept[1]["suite"]

    def test_judging_alone_gives_the_same(self, lens, swept):
        judgement, beside = judge_lens(lens, SUITE, **QUICK)
        block = swept[1]["tuned_lens"]
        assert judgement.as_dict() == {name: block[name] for name in ("kpis", "acceptance")}
        assert beside == {name: swept[1][name] for name in ("layers", "diagnostics")}

    def test_mistakes_are_found_before_anything_is_read(self, lens, tmp_path):
        long = [Prompt("long", "w3 " * 129)]
        with pytest.raises(ValueError, match="prompt 'long': it has 129 tokens, the model reads 128"):
            sweep(lens, lens.subject_model, lens.tokenizer, long, tmp_path / "run", **QUICK)
        assert not (tmp_path / "run").exists()


class TestDiagnostics:
    def test_the_last_layer_is_the_head(self, swept):
        last = swept[1]["diagnostics"]["last_layer"]
        assert last["norm"]["max_kl_bits"] < 1e-6 and last["tuned"]["max_kl_bits"] < 1e-6
        assert last["kl_after_temp_bits"] < 1e-6 and last["temperature"] == 1

    def test_a_last_layer_that_is_too_sure_is_mended_by_its_temperature_and_shown(self, lens):
        sharper = tiny_tuned_lens()
        sharper.readout.weight = sharper.readout.weight * 1.5
        (prompt, *_) = tokenise_suite(SUITE, tiny_tokenizer())
        last = diagnostics([read_prompt(sharper, prompt)])["last_layer"]
        assert last["norm"]["mean_kl_bits"] > 0.05
        assert last["temperature"] == pytest.approx(1.5, rel=0.02)
        assert last["kl_after_temp_bits"] < 1e-3

    def test_the_raw_lens_stands_beside(self, swept):
        raw = swept[1]["diagnostics"]["raw_lens"]
        assert list(raw) == ["norm", "tuned"]
        for of in raw.values():
            assert len(of["median_kl_bits"]) == NUM_LAYERS and of["max_kl_bits"] == max(of["median_kl_bits"])

    @pytest.mark.parametrize(("norm", "tuned", "raises"), [(0.0, 0.7, True), (0.7, 0.7, False), (0.7, 0.0, False)])
    def test_a_tuned_lens_that_raises_the_risk_is_told(self, lens, norm, tuned, raises):
        prompt = tokenise_suite(SUITE, tiny_tokenizer())[2]
        kls = {"norm": torch.full((NUM_LAYERS, 3), norm), "tuned": torch.full((NUM_LAYERS, 3), tuned)}
        found = diagnostics([dataclasses.replace(read_prompt(lens, prompt), raw_kl_bits=kls)])
        words = {0.0: "low", 0.7: "medium"}
        assert found["lens_artifact_risk"] == {"norm": words[norm], "tuned": words[tuned]}
        assert found["tuned_lens_raises_risk"] is raises

    def test_answers_that_the_raw_lens_does_not_show_are_counted(self, lens):
        results = [read_prompt(lens, prompt) for prompt in tokenise_suite(SUITE[:2], tiny_tokenizer())]
        for result, norm, raw in zip(results, ([1, 1, 1], [2, 2, 2]), ([1, 3, 2], [1, 1, 1]), strict=True):
            result.lenses["norm"].answer_rank[:] = torch.tensor(norm)
            result.raw_rank[:] = torch.tensor(raw)
        assert diagnostics(results)["raw_lens"]["norm"]["answers_on_top_not_in_raw"] == 2

    @pytest.mark.parametrize(
        ("kl", "answers", "risk"),
        [(0.0, 0, "low"), (0.49, 0, "low"), (0.5, 0, "medium"), (0.99, 0, "medium"), (1.0, 0, "high"), (0, 1, "high")],
    )
    def test_the_risk_is_by_the_distance_to_the_raw_lens(self, kl, answers, risk):
        assert artifact_risk(kl, answers) == risk

    def test_without_a_final_norm_there_is_none(self):
        lens = tiny_tuned_lens()
        lens.readout._norm = None
        lens.readout._norm_tensors = {}
        results = [read_prompt(lens, prompt, with_tuned=False) for prompt in tokenise_suite(SUITE, tiny_tokenizer())]
        found = diagnostics(results)
        assert found["lens_artifact_risk"] == {"norm": "low"}
        assert found["raw_lens"]["norm"] == {
            "median_kl_bits": [0.0] * NUM_LAYERS, "max_kl_bits": 0.0, "answers_on_top_not_in_raw": 0,
        }  # fmt: skip


def test_without_a_tuned_lens_the_norm_lens_is_swept_alone(lens, swept, tmp_path):
    for file in FILES:
        (tmp_path / file).write_text("of an earlier sweep")
    run = sweep(None, tiny_model("llama"), tiny_tokenizer(), SUITE, tmp_path, "run", **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "run-pure-next-token.csv",
        "run-records.csv",
        "run.json",
    ]
    assert run["tuned_lens"] == {"enabled": False} and run["lenses"] == ["norm"]
    assert [layer["calibrated_norm"]["kl_from_final_bits"] for layer in run["layers"]] == [None] * run["num_layers"]
    assert all("tuned" not in layer for layer in run["layers"])
    for file in ("run-records.csv", "run-pure-next-token.csv"):
        assert (tmp_path / file).read_text() == (swept[0] / file).read_text()


def test_a_suite_without_answers_has_kl_alone(lens):
    judgement, beside = judge_lens(lens, [Prompt("a", "w3 w4"), Prompt("b", "w5 w6", "Paris", FACTUAL)], **QUICK)
    assert judgement.kpis.prompts_with_answer == 0
    assert not judgement.gates.gate_b and judgement.gates.gate_c
    assert beside["layers"][0]["norm"]["answer_rank"] is None
    assert all(math.isfinite(figure.value) for figure in judgement.kpis.delta_kl_bits)


class TestFinding:
    MESSAGE = (
        r"Tuned Lens not found for `tiny`\. Train it with `consistency-lens tuned-lens fit --model me/tiny` "
        r"\(looked in 'tuned_lenses/tiny'\)"
    )

    @pytest.fixture(autouse=True)
    def inside(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def test_require_fails_with_the_plans_message(self):
        with pytest.raises(ValueError, match=self.MESSAGE):
            find_lens("me/tiny", "require")

    def test_auto_says_it_and_goes_on(self, caplog):
        with caplog.at_level(logging.INFO):
            assert find_lens("me/tiny", "auto") is None
        assert "Tuned Lens not found for `tiny`" in caplog.text and "norm lens alone" in caplog.text

    def test_a_lens_is_found_at_its_place_or_where_it_is_said_to_be(self, lens, tmp_path):
        lens.save_pretrained(tmp_path / "tuned_lenses" / "tiny")
        for tuned in ("auto", "require"):
            assert str(find_lens("me/tiny", tuned)) == "tuned_lenses/tiny"
            assert find_lens("other", tuned, tmp_path / "tuned_lenses" / "tiny") == tmp_path / "tuned_lenses" / "tiny"
        assert find_lens("me/tiny", "off") is None

    def test_a_place_that_was_said_has_to_hold_one(self, tmp_path):
        with pytest.raises(ValueError, match=r"Tuned Lens not found for `tiny`.*looked in .*elsewhere'"):
            find_lens("me/tiny", "auto", tmp_path / "elsewhere")
        assert find_lens("me/tiny", "off", tmp_path / "elsewhere") is None

    def test_half_a_lens_is_none(self, lens, tmp_path):
        lens.save_pretrained(tmp_path / "tuned_lenses" / "tiny")
        (tmp_path / "tuned_lenses" / "tiny" / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=self.MESSAGE):
            find_lens("me/tiny", "require")

    def test_another_word_is_an_error(self):
        with pytest.raises(ValueError, match="tuned must be one of auto, require, off, got 'on'"):
            find_lens("me/tiny", "on")


def test_figures_do_not_depend_on_gradients_being_on(lens):
    with torch.enable_grad():
        judgement, _ = judge_lens(lens, SUITE, **QUICK)
    assert math.isfinite(judgement.kpis.delta_kl_bits[0].value)
