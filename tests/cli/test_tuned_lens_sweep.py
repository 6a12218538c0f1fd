"""`consistency-lens tuned-lens sweep` and `gates` on a tiny model and lens in folders, and what users get wrong."""

import json
import shutil

import pytest
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.cli.tuned_lens import gates as gates_command
from consistency_lens.cli.tuned_lens import sweep as sweep_command
from consistency_lens.fingerprints import weights_hash
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.records import read_records

PROVENANCE = {"enabled": True, "model_id": "me/tiny", "seed": 316, "kpis": None, "acceptance": None}
SUITE = [{"text": "w5 w9 w11", "answer": "w23"}, {"text": "w7 w8", "answer": "w30"}, {"text": "w3 w4 w4"}]
QUICK = ("--num_bootstrap", "20", "--disable_tqdm", "--device", "cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and a lens that is close to its norm lens, at the place where it is looked for."""
    root = tmp_path_factory.mktemp("folders")
    tiny_model("llama").save_pretrained(root / "tiny")
    tiny_tokenizer().save_pretrained(root / "tiny")
    subject = tiny_model("llama")
    subject.config.name_or_path = str(root / "tiny")
    lens = TunedLens.for_model(subject, tiny_tokenizer())
    lens.provenance = PROVENANCE
    lens.save_pretrained(root / "tuned_lenses" / "tiny")
    (root / "suite.json").write_text(json.dumps(SUITE))
    return root


@pytest.fixture
def place(folders, tmp_path, monkeypatch):
    """A copy of them that the commands are run in."""
    shutil.copytree(folders, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def sweep(*flags):
    return sweep_command.main(["--model", "tiny", "--suite", "suite.json", *QUICK, *flags])


def gates(*flags):
    return gates_command.main(["--lens", "tuned_lenses/tiny", "--suite", "suite.json", *QUICK, *flags])


def read(path):
    return json.loads(path.read_text())


def error_of(capsys):
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


class TestSweep:
    def test_finds_the_lens_of_a_model_and_shows_layers_kpis_and_gates(self, place, capsys):
        assert sweep() == 0
        folder = place / "outputs" / "sweeps" / "tiny"
        run, arguments = read(folder / "sweep.json"), read(folder / "sweep-arguments.json")
        assert run["tuned_lens"]["model_id"] == "me/tiny"
        assert run["suite"]["name"] == "suite.json" and run["suite"]["prompts"] == 3
        assert (arguments["lens"], arguments["seed"]) == ("tuned_lenses/tiny", 316)
        assert len(read_records(folder / "sweep-pure-next-token-tuned.csv")) == 3 * 3
        printed = capsys.readouterr().out
        for text in (
            "calibrated",
            "bits of KL below the norm lens's at 25 % depth (layer 0)",
            "not passed",
            "sweep.json",
        ):
            assert text in printed
        # a sweep does not judge for good
        assert read(place / "tuned_lenses" / "tiny" / "provenance.json") == PROVENANCE

    def test_without_a_lens_goes_on_unless_one_is_required(self, place, capsys):
        shutil.rmtree(place / "tuned_lenses")
        assert sweep("--output_dir", "out", "--name", "norm") == 0
        assert read(place / "out" / "norm.json")["tuned_lens"] == {"enabled": False}
        assert not (place / "out" / "norm-records-tuned.csv").exists()
        capsys.readouterr()
        assert sweep("--tuned", "require") == 2
        assert error_of(capsys) == (
            "error: Tuned Lens not found for `tiny`. Train it with `consistency-lens tuned-lens fit --model tiny` "
            "(looked in 'tuned_lenses/tiny')"
        )

    def test_require_fails_before_the_model_is_loaded(self, place, capsys):
        assert sweep_command.main(["--model", "me/not-there", "--tuned", "require"]) == 2
        assert "Tuned Lens not found for `not-there`" in error_of(capsys)

    def test_off_leaves_the_lens_aside(self, place):
        assert sweep("--tuned", "off", "--output_dir", "out") == 0
        assert read(place / "out" / "sweep.json")["lenses"] == ["norm"]

    def test_reads_prompts_of_the_command_line(self, place):
        flags = ("--model", "tiny", "--output_dir", "out", *QUICK)
        assert sweep_command.main([*flags, "--prompt", "w3 w4", "w5"]) == 0
        prompts = read(place / "out" / "sweep.json")["prompts"]
        assert [(of["id"], of["text"], of["kind"]) for of in prompts] == [
            ("prompt-1", "w3 w4", "free"),
            ("prompt-2", "w5", "free"),
        ]

    def test_the_default_suite_is_read_by_any_tokenizer(self, place):
        assert sweep_command.main(["--model", "tiny", "--output_dir", "out", *QUICK]) == 0
        run = read(place / "out" / "sweep.json")
        assert run["suite"]["name"] == "default" and len(run["prompts"]) == 20
        assert run["tuned_lens"]["kpis"]["prompts_with_answer"] == 0  # none of its words is known here

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--model", ""), "model: got none"),
            (("--prompt", "w3"), "prompt: got prompts and the suite 'suite.json'; pass one of them"),
            (("--suite", "none.json"), "suite: no file at 'none.json'"),
            (("--suite", "empty.txt"), "suite: empty.txt has no prompts"),
            (("--tuned", "on"), "tuned must be one of auto, require, off, got 'on'"),
            (("--name", "a/b"), "name: got 'a/b'"),
            (("--num_bootstrap", "0"), "num_bootstrap must be at least 1"),
            (("--seed", "-1"), "seed must be 0 or more, got -1"),
            (("--dtype", "int3"), "dtype must be one of"),
            (("--model", "no/such/model"), "model: cannot load 'no/such/model'"),
        ],
    )
    def test_mistakes_end_in_one_line(self, place, capsys, flags, message):
        (place / "empty.txt").write_text("\n")
        assert sweep(*flags) == 2
        assert message in error_of(capsys)
        assert not (place / "outputs").exists()

    def test_a_lens_of_another_model_is_refused(self, place, capsys):
        tiny_model("llama", num_hidden_layers=4).save_pretrained(place / "deeper")
        tiny_tokenizer().save_pretrained(place / "deeper")
        assert sweep("--model", "deeper", "--lens", "tuned_lenses/tiny") == 2
        assert "num_hidden_layers is 4, the lens was made for 3" in error_of(capsys)

    def test_a_folder_of_something_else_is_no_lens(self, place, capsys):
        assert sweep("--lens", "tiny") == 2
        assert "'tiny' is a llama model; pass the folder of a tuned lens" in error_of(capsys)


class TestGates:
    def test_are_written_into_the_lens_and_end_in_3_where_one_does_not_pass(self, place, capsys):
        assert gates() == 3
        lens = place / "tuned_lenses" / "tiny"
        provenance, written = read(lens / "provenance.json"), read(lens / "gates.json")
        assert provenance["acceptance"] == {"gate_A": False, "gate_B": False, "gate_C": True, "gate_D": True}
        assert provenance["kpis"]["suite"]["name"] == "suite.json"
        assert {name: provenance[name] for name in ("enabled", "model_id", "seed")} == {
            name: PROVENANCE[name] for name in ("enabled", "model_id", "seed")
        }
        assert written["kpis"] == provenance["kpis"] and written["arguments"]["gates"] == ["A", "B", "C", "D"]
        assert "not passed: A, B" in capsys.readouterr().out

    def test_only_those_that_are_asked_for_count(self, place, capsys):
        assert gates("--gates", "C", "D") == 0
        assert "passed: C, D" in capsys.readouterr().out
        assert read(place / "tuned_lenses" / "tiny" / "provenance.json")["acceptance"]["gate_A"] is False

    def test_agree_with_the_sweep(self, place):
        assert sweep() == 0 and gates() == 3
        block = read(place / "outputs" / "sweeps" / "tiny" / "sweep.json")["tuned_lens"]
        assert read(place / "tuned_lenses" / "tiny" / "provenance.json") == block

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--lens", ""), "lens: got none"),
            (("--lens", "none"), "lens: cannot read 'none/provenance.json'"),
            (("--gates", "E"), "gates: got 'E'; any of A, B, C, D"),
            (("--suite", "none.json"), "suite: no file at 'none.json'"),
            (("--num_bootstrap", "0"), "num_bootstrap must be at least 1"),
            (("--seed", "-1"), "seed must be 0 or more, got -1"),
            (("--model", "no/such/model"), "model: cannot load 'no/such/model'"),
        ],
    )
    def test_mistakes_end_in_one_line_and_leave_the_lens_as_it_is(self, place, capsys, flags, message):
        assert gates(*flags) == 2
        assert message in error_of(capsys)
        assert read(place / "tuned_lenses" / "tiny" / "provenance.json") == PROVENANCE
        assert not (place / "tuned_lenses" / "tiny" / "gates.json").exists()

    def test_a_model_that_cannot_be_compared_does_not_pass_for_the_one_of_the_fit(self, place, capsys):
        tiny_model("llama", seed=1).save_pretrained(place / "other")
        tiny_tokenizer().save_pretrained(place / "other")
        file = place / "tuned_lenses" / "tiny" / "provenance.json"
        assert gates("--model", "other") == 2
        assert "the lens has no record of its subject's weights; leave out --model" in error_of(capsys)
        provenance = PROVENANCE | {"weights_hash": weights_hash(tiny_model("llama"))}
        file.write_text(json.dumps(provenance))
        for model in ("other", "tiny"):
            assert gates("--model", model, "--dtype", "bfloat16") == 2
            assert error_of(capsys).endswith(
                f"subject: '{model}' was not compared with the model that the lens was made for: it is loaded in "
                "bfloat16, the hash of its weights was taken in float32; load it in float32"
            )
        assert read(file) == provenance and not file.with_name("gates.json").exists()
        assert gates("--model", "tiny") == 3

    def test_a_provenance_without_a_lens_is_refused(self, place, capsys):
        (place / "tuned_lenses" / "tiny" / "model.safetensors").unlink()
        assert gates() == 2
        assert "lens: no tuned lens at 'tuned_lenses/tiny'" in error_of(capsys)
