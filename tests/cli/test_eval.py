"""`consistency-lens eval` on a lens that was just trained, and every mistake that a user can make."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from consistency_lens.cli import main as command_line
from consistency_lens.cli import train
from consistency_lens.cli.eval import main
from consistency_lens.evaluation import CHECKS, CONTROLS

TEXT = "\n<|endoftext|>\n".join(" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(14)) for i in range(30))
SEED = 3
QUICK = {"rows": 16, "num_samples": 2, "num_bootstrap": 1000, "disable_tqdm": True, "device": "cpu"}
SHORT_CHECKS = {"best_of": 2, "check_rows": 4, "fresh_encoder_steps": 2}


def as_flags(settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def evaluate(lens, **changes):
    checks = changes.pop("checks", "none").split()
    return main([*as_flags({"lens": lens} | QUICK | changes), "--checks", *checks])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A lens, with its cache beside it; tests that write into its folder take a copy."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_model("llama").save_pretrained(folder / "subject")
    tiny_tokenizer().save_pretrained(folder / "subject")
    (folder / "text.txt").write_text(TEXT)
    settings = {
        "model": folder / "subject", "layer": 1, "num_text_tokens": 3, "min_position": 4, "max_length": 16,
        "dataset": folder / "text.txt", "positions_per_sequence": 3, "validation_fraction": 0.3, "eval_rows": 16,
        "num_samples": 2, "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "seed": SEED,
        "output_dir": folder / "lens", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "sample_steps": 2, "tracked_samples": 2, "eval_strategy": "steps", "eval_steps": 2, "interim_eval_rows": 6,
        "eval_checks": "best_of_n",
    }  # fmt: skip
    assert train.main(as_flags(settings)) == 0
    return folder


@pytest.fixture
def lens(trained, tmp_path):
    shutil.copytree(trained / "lens", tmp_path / "lens")
    return tmp_path / "lens"


@pytest.fixture
def other_subject(trained, tmp_path):
    """The subject with a weight that is another."""
    model = AutoModelForCausalLM.from_pretrained(trained / "subject")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    shutil.copytree(trained / "subject", tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def metrics_in(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def figures(metrics):
    records = ("seconds", "samples_per_second", "arguments", "data")
    return {name: of for name, of in metrics.items() if name not in records}


class TestTraining:
    def test_a_run_leaves_its_sample_tables_and_the_figures_of_each_evaluation(self, trained):
        tables = (trained / "lens" / "sample_tables.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        assert [json.loads(line)["step"] for line in tables] == [2, 2, 4, 4]
        history = json.loads((trained / "lens" / "log_history.json").read_text())
        assert [entry["step"] for entry in history if "eval_fve" in entry] == [2, 4]

    def test_the_final_evaluation_has_every_control_and_the_checks_that_are_asked_for(self, trained):
        metrics = metrics_in(trained / "lens")
        assert list(metrics["controls"]) == list(CONTROLS)
        assert [name for name in CHECKS if name in metrics] == ["best_of_n"]
        assert "The best of n sampled texts" in (trained / "lens" / "README.md").read_text()


class TestEvaluation:
    def test_gives_what_training_wrote(self, trained, lens):
        samples = (lens / "samples.jsonl").read_text()
        assert evaluate(lens, checks="best_of_n") == 0
        # a part of the checks does not replace the record of the whole
        found = metrics_in(lens / "evaluation")
        assert figures(found) == figures(metrics_in(trained / "lens"))
        assert found["data"] == {"dataset": str(trained / "text.txt"), "dataset_revision": None}
        assert (lens / "evaluation" / "samples.jsonl").read_text() == samples

    def test_runs_every_check_by_default_and_renews_the_card(self, lens, capsys):
        assert main(as_flags({"lens": lens} | QUICK | SHORT_CHECKS)) == 0
        metrics = metrics_in(lens)
        assert set(CHECKS) <= metrics.keys()
        assert metrics["arguments"]["evaluation"]["best_of"] == 2
        assert metrics["arguments"]["lens"]["activations"] == str(lens / "data" / "activations-layer1")
        assert metrics["arguments"]["recipe"]["num_text_tokens"] == 3
        card, printed = (lens / "README.md").read_text(), capsys.readouterr().out
        for text in ("another reader", "linear probe"):
            assert text in card and text in printed

    def test_another_output_folder_leaves_the_lens_as_it_is(self, trained, lens, tmp_path):
        before = {path.name: path.read_bytes() for path in lens.iterdir() if path.is_file()}
        assert evaluate(lens, output_dir=tmp_path / "figures", rows=8) == 0
        assert {path.name for path in (tmp_path / "figures").iterdir()} == {"metrics.json", "samples.jsonl"}
        assert metrics_in(tmp_path / "figures")["rows"] == 8
        assert {path.name: path.read_bytes() for path in lens.iterdir() if path.is_file()} == before

    def test_finds_the_cache_that_the_provenance_names(self, trained, lens):
        shutil.rmtree(lens / "data")
        assert evaluate(lens) == 2  # it lay in the lens's own folder
        record(lens, cache_dir=str(trained / "lens" / "data"))
        assert evaluate(lens) == 0
        assert metrics_in(lens)["fve"] == metrics_in(trained / "lens")["fve"]

    def test_at_the_commit_that_is_pinned_any_precision_is_the_lenss_own(self, lens):
        config = (lens / "config.json").read_text()
        (lens / "config.json").write_text(
            config.replace('"base_model_revision": null', f'"base_model_revision": "{"a" * 40}"')
        )
        assert evaluate(lens, dtype="bfloat16") == 0
        assert metrics_in(lens / "evaluation")["arguments"]["lens"]["dtype"] == "bfloat16"

    def test_a_share_held_out_may_be_given(self, trained, lens):
        assert evaluate(lens, validation_fraction=0.15, rows=1000, output_dir=lens / "fewer") == 0
        assert evaluate(trained / "lens", rows=1000, output_dir=lens / "as_trained") == 0
        assert metrics_in(lens / "fewer")["documents"] < metrics_in(lens / "as_trained")["documents"]

    def test_is_a_command_and_an_example(self, lens, capsys):
        assert command_line.main(["eval", "--lens", str(lens), "--rows", "0"]) == 2
        assert "rows must be at least 1" in capsys.readouterr().err
        example = Path(__file__).parents[2] / "examples" / "evaluate_lens.py"
        assert runpy.run_path(str(example))["main"] is main


def record(lens, **recipe):
    """Changes the recipe in a lens's provenance."""
    path = lens / "provenance.json"
    provenance = json.loads(path.read_text())
    provenance["recipe"] |= recipe
    path.write_text(json.dumps(provenance))


def change_provenance(lens, **changes):
    path = lens / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


def record_in_cache(lens, **changes):
    path = lens / "data" / "activations-layer1" / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_error(capsys):
    printed = capsys.readouterr().err.rstrip().splitlines()
    (error,) = (line for line in printed if line.startswith("error: "))
    assert printed[-1] == error
    return error


class TestMistakes:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lens": ""}, "lens: got none"),
            ({"lens": "no/such/lens"}, "output_dir: the lens 'no/such/lens' is no folder"),
            ({"lens": "no/such/lens", "output_dir": "."}, "cannot load 'no/such/lens'"),
            ({"activations": "no/such/cache"}, "no cache at 'no/such/cache'; pass the folder of one"),
            ({"validation_fraction": 0.9}, "the training held out 0.3 of the documents, got 0.9"),
            ({"validation_fraction": -1}, "validation_fraction must lie between 0 and 1"),
            ({"dtype": "int3"}, "dtype must be one of"),
            ({"device": "abacus"}, "device: got 'abacus'"),
            ({"rows": 0}, "rows must be at least 1"),
            ({"num_samples": 0}, "num_samples must be at least 1"),
            ({"checks": "phrenology"}, "checks: got the unknown name 'phrenology'"),
            ({"controls": "median"}, "controls: got the unknown name 'median'"),
        ],
    )
    def test_end_in_one_line_and_exit_code_2(self, trained, capsys, changes, message):
        before = metrics_in(trained / "lens")
        assert evaluate(**({"lens": trained / "lens"} | changes)) == 2
        assert message in one_error(capsys)
        assert metrics_in(trained / "lens") == before

    @pytest.mark.parametrize(("name", "value"), [("layer", 0), ("width", 64), ("weights_hash", "0" * 64)])
    def test_a_cache_of_another_lens_is_named_with_both_values(self, lens, capsys, name, value):
        record_in_cache(lens, **{name: value})
        assert evaluate(lens) == 2
        error = one_error(capsys)
        assert f"has {name} {value!r}, but the lens has" in error

    def test_a_share_is_refused_where_the_dataset_was_split_already(self, lens, capsys):
        change_provenance(lens, held_out_fraction=None)
        assert evaluate(lens, validation_fraction=0.1) == 2
        assert "validation_fraction: got 0.1, but the dataset of the training was split" in one_error(capsys)

    def test_so_are_activations_that_are_not_split(self, lens, capsys):
        change_provenance(lens, held_out_fraction=None)
        assert evaluate(lens) == 2
        assert "the dataset of the training was split already" in one_error(capsys)

    def test_a_cache_of_another_text_is_not_taken_for_that_of_the_training(self, lens, capsys):
        record_in_cache(lens, dataset_hash="0" * 64)
        assert evaluate(lens) == 2
        assert "is of another text than the lens was trained on" in one_error(capsys)

    def test_a_lens_without_a_text_is_not_read_on_the_fly(self, lens, capsys):
        record(lens, activations="someone/activations", dataset=None)
        assert evaluate(lens, activations="on_the_fly") == 2
        assert "the lens was trained on 'someone/activations', not on a text" in one_error(capsys)
        assert not list(lens.rglob("corpus-*"))

    def test_another_model_is_not_taken_for_the_subject(self, lens, other_subject, capsys):
        for activations in ("on_the_fly", lens / "data" / "activations-layer1"):
            assert evaluate(lens, model=other_subject, activations=activations) == 2
            assert "has weights of hash" in one_error(capsys)

    @pytest.mark.parametrize("checks", ["none", " ".join(CHECKS)])
    def test_nor_do_figures_of_one_that_cannot_be_compared_go_to_the_lens(self, lens, other_subject, capsys, checks):
        asked = {"dtype": "bfloat16", "activations": "on_the_fly", "checks": checks}
        before = {path.name: path.read_bytes() for path in lens.iterdir() if path.is_file()}
        # its own subject lies in a folder too, whose weights may have changed
        for changes in ({"model": other_subject}, {"model": other_subject, "output_dir": lens}, {}):
            assert evaluate(lens, **asked, **changes) == 2
            assert one_error(capsys).endswith(
                "was not compared with the model that the lens was made for: it is loaded in bfloat16, the hash of "
                "its weights was taken in float32; load it in float32, or pass another --output_dir"
            )
        assert {path.name: path.read_bytes() for path in lens.iterdir() if path.is_file()} == before

    def test_nor_of_one_for_a_lens_that_has_no_record(self, trained, lens, capsys):
        provenance = json.loads((lens / "provenance.json").read_text())
        change_provenance(lens, cache=without(provenance["cache"], "weights_hash"))
        assert evaluate(lens, model=trained / "subject") == 2
        assert "the lens has no record of its subject's weights; leave out --model, or pass" in one_error(capsys)
        assert evaluate(lens) == 0

    def test_nor_does_it_read_activations_of_the_training(self, lens, other_subject, tmp_path, capsys):
        asked = {"model": other_subject, "dtype": "bfloat16", "output_dir": tmp_path / "figures"}
        assert evaluate(lens, **asked) == 2
        assert "has weights_hash" in one_error(capsys)
        assert evaluate(lens, activations="on_the_fly", **asked) == 0

    def test_a_lens_without_a_record_of_its_training(self, lens, capsys):
        (lens / "provenance.json").unlink()
        assert evaluate(lens) == 2
        assert "validation_fraction: the lens" in one_error(capsys)

    def test_a_folder_that_is_no_lens(self, trained, capsys):
        assert evaluate(trained / "subject") == 2
        assert "is a llama model; pass the folder or Hub id of a lens" in one_error(capsys)
