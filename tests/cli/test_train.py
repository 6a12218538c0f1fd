"""The whole job through its command: a tiny subject on disk, a few steps, and every mistake that a user can make."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoModel

from consistency_lens.cli.eval import main as evaluate
from consistency_lens.cli.tokenize import main as tokenize
from consistency_lens.cli.train import main
from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.tokenized_corpus import open_corpus
from consistency_lens.training import recipe

TEXT = "\n<|endoftext|>\n".join(" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(14)) for i in range(30))


@pytest.fixture(scope="module")
def subject_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    model = tiny_model("llama")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def flags(subject_folder, output_dir, **changes):
    settings = {
        "model": subject_folder, "layer": 1, "num_text_tokens": 3, "min_position": 4, "max_length": 16,
        "dataset": Path(subject_folder) / "text.txt", "positions_per_sequence": 3, "validation_fraction": 0.3,
        "eval_rows": 16, "num_samples": 2, "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True,
        "output_dir": output_dir, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 2,
    } | changes  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run_folder(subject_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main(flags(subject_folder, folder)) == 0
    return folder


def test_a_run_leaves_a_lens_its_figures_and_its_arguments(run_folder):
    metrics = json.loads((run_folder / "metrics.json").read_text())
    controls = {"mean", "shuffled", "empty_text", "random_tokens", "context_tail", "current_token_only", "untrained"}
    assert controls <= set(metrics["controls"])
    assert metrics["controls"]["mean"]["fve"] == pytest.approx(0, abs=1e-6)
    low, high = metrics["ci95"]["fve"]
    assert low <= metrics["fve"] <= high
    assert len((run_folder / "samples.jsonl").read_text().splitlines()) == 2
    run = json.loads((run_folder / "run.json").read_text())
    assert run["recipe"]["layer"] == 1 and run["seconds"] > 0
    assert "FVE" in (run_folder / "README.md").read_text()
    assert not list(run_folder.rglob("*.bin")) + list(run_folder.rglob("*.pt")) + list(run_folder.rglob("*.pkl"))


def test_figures_of_one_lens_never_stand_beside_another(subject_folder, run_folder, tmp_path, monkeypatch):
    """A run that is killed while it evaluates leaves its lens without figures, not with those of an earlier one."""

    def killed(*_arguments):
        raise KeyboardInterrupt

    folder = shutil.copytree(run_folder, tmp_path / "run")
    monkeypatch.setattr(recipe, "evaluate_and_write", killed)
    with pytest.raises(KeyboardInterrupt):
        main(flags(subject_folder, folder, learning_rate=1e-2))
    before, after = (load_file(path / "model.safetensors") for path in (run_folder, folder))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    left = {path.name for path in folder.iterdir()}
    assert left.isdisjoint({"metrics.json", "run.json", "samples.jsonl", "log_history.json", "README.md"})
    assert not {name for name in left if name.startswith(".")}


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_subject_is_not_written_over(subject_folder, capsys, dry_run):
    before = (subject_folder / "model.safetensors").read_bytes()
    assert main(flags(subject_folder, subject_folder, dry_run=dry_run)) == 2
    assert "holds a model of type 'llama', which the training would write over" in capsys.readouterr().err
    assert (subject_folder / "model.safetensors").read_bytes() == before and not (subject_folder / "data").exists()


@pytest.mark.parametrize("activations", ["on_the_fly", "folder"])
def test_every_source_of_activations_gives_the_same_lens(subject_folder, run_folder, tmp_path, activations):
    changes = {"activations": activations}
    if activations == "folder":
        changes = {"activations": run_folder / "data" / "activations-layer1", "dataset": None, "layer": None}
    arguments = flags(subject_folder, tmp_path / "run", **changes)
    arguments = [
        part for pair in zip(arguments[::2], arguments[1::2], strict=True) if pair[1] != "None" for part in pair
    ]
    assert main(arguments) == 0
    assert not list(tmp_path.rglob("*.arrow"))
    metrics, expected = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path / "run", run_folder))
    for name in ("fve", "kl", "kl_recovered", "text_perplexity"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-3)
    for name in ("rows", "documents"):
        assert metrics[name] == expected[name]
    # and what it was trained on is found again
    assert evaluate(["--lens", str(tmp_path / "run"), "--rows", "16", "--checks", "none"]) == 0
    again = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert again["fve"] == pytest.approx(metrics["fve"], rel=1e-6)


def test_a_tokenised_corpus_keeps_its_own_split(subject_folder, tmp_path):
    text = subject_folder / "text.txt"
    corpus = {"dataset": text, "model": subject_folder, "output_dir": tmp_path / "corpus", "validation_fraction": 0.4}
    assert tokenize([part for name, value in corpus.items() for part in (f"--{name}", str(value))]) == 0
    assert main(flags(subject_folder, tmp_path / "run", dataset=tmp_path / "corpus")) == 0
    lens = json.loads((tmp_path / "run" / "provenance.json").read_text())
    held_out = [row["document"] for row in open_corpus(tmp_path / "corpus", "validation")]
    cache = ActivationCache.open(tmp_path / "run" / "data" / "activations-layer1-splits" / "validation")
    assert set(cache.documents) == set(held_out)
    assert lens["validation_rows"] == len(cache) and lens["cache"]["dataset"] == str(text)


def test_a_corpus_of_another_tokenizer_is_refused(subject_folder, tmp_path, capsys):
    folder = tmp_path / "other"
    shutil.copytree(subject_folder, folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(folder)
    corpus = {"dataset": subject_folder / "text.txt", "model": folder, "output_dir": tmp_path / "corpus"}
    assert tokenize([part for name, value in corpus.items() for part in (f"--{name}", str(value))]) == 0
    assert main(flags(subject_folder, tmp_path / "run", dataset=tmp_path / "corpus")) == 2
    assert "was made with the tokenizer of" in capsys.readouterr().err


def test_the_artifact_is_little_more_than_what_was_trained(run_folder):
    lens = AutoModel.from_pretrained(run_folder)
    trained = sum(tensor.numel() * tensor.element_size() for tensor in lens.trained_tensors().values())
    assert sum(path.stat().st_size for path in run_folder.glob("*.safetensors")) < 1.5 * trained


@pytest.mark.parametrize("clones", ["lora", "frozen"])
def test_clones_that_share_weights_train_and_load(subject_folder, tmp_path, clones):
    assert main(flags(subject_folder, tmp_path, clones=clones, delta_residual="detached", eval_strategy="steps")) == 0
    assert len(AutoModel.from_pretrained(tmp_path).explain("w5 w6 w7")) == 3


def test_texts_may_stop_and_be_taxed_and_start_from_summaries(subject_folder, tmp_path):
    pairs = [{"context": f"w{i} w{i + 1} w{i + 2}", "summary": f"w{i}"} for i in range(5, 12)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    settings = {"summaries": tmp_path / "pairs.jsonl", "stop_at_eos": True, "length_penalty": 0.1, "max_steps": 6}
    settings |= {"shorter_share": 1}
    stages = ["--stages", "warm_start 4s", "policy_gradient"]
    assert main([*flags(subject_folder, tmp_path / "run", **settings), *stages]) == 0
    lens = AutoModel.from_pretrained(tmp_path / "run")
    assert lens.config.decoder.stop_token_id == 2
    log = json.loads((tmp_path / "run" / "log_history.json").read_text())
    assert any("text_length" in entry for entry in log)
    ids, other = torch.tensor([[5, 2, 7], [5, 7, 7]]), torch.tensor([[5, 2, 9], [5, 7, 7]])
    with torch.no_grad():  # behind the stop token nothing is read
        assert torch.equal(lens.read_ids(ids), lens.read_ids(other))


def test_a_lens_finds_its_subject_from_anywhere(subject_folder, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "subject").symlink_to(subject_folder)
    monkeypatch.chdir(tmp_path)
    assert main(flags("models/subject", tmp_path / "outputs" / "run", dataset=subject_folder / "text.txt")) == 0
    monkeypatch.chdir(subject_folder)
    assert len(AutoModel.from_pretrained(tmp_path / "outputs" / "run").explain("w5 w6 w7")) == 3


@pytest.mark.parametrize("clones", ["full", "frozen"])
def test_a_lens_loads_its_subject_in_the_precision_that_it_was_trained_with(subject_folder, tmp_path, clones):
    folder = tmp_path / "bf16"
    tiny_model("llama").bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    text = subject_folder / "text.txt"
    assert main(flags(folder, tmp_path / "run", dataset=text, clones=clones, dtype="float32")) == 0
    lens = AutoModel.from_pretrained(tmp_path / "run")
    assert lens.subject.model.dtype == torch.float32
    assert {parameter.dtype for parameter in lens.parameters()} == {torch.float32}


def test_the_saved_lens_loads_and_explains(run_folder):
    explanation = AutoModel.from_pretrained(run_folder).explain("w5 w6 w7 w8 w9")
    assert [row.position for row in explanation] == [1, 2, 3, 4, 5]


def test_sampling_serves_where_there_is_no_text(subject_folder, tmp_path):
    arguments = flags(subject_folder, tmp_path, num_documents=20)
    position = arguments.index("--dataset")
    assert main(arguments[:position] + arguments[position + 2 :]) == 0
    assert list((tmp_path / "data").glob("corpus-*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 7}, "layer must lie in 0..2"),
        ({"dtype": "auto"}, "dtype must be one of"),
        ({"validation_fraction": 2}, "validation_fraction must lie between"),
        ({"positions_per_sequence": 0}, "positions_per_sequence must be at least 1"),
        ({"max_length": 500}, "beyond the subject's context"),
        ({"resume_from_checkpoint": "true"}, "no checkpoint in"),
        ({"resume_from_checkpoint": "nowhere"}, "is no checkpoint folder"),
        ({"num_text_tokens": 0}, "num_text_tokens must be at least 1"),
        ({"decoder_prompt": "no slot"}, "<embed> exactly once"),
        ({"encoder_prompt": "no slot"}, "<text> exactly once"),
        ({"min_position": 0}, "min_position must be at least 1"),
        (
            {"length_penalty": 0.5, "shorter_share": 1},
            "length_penalty: got 0.5, but texts of this lens",
        ),
        ({"summaries": "nowhere.jsonl"}, "summaries: cannot read 'nowhere.jsonl'"),
        ({"reward": "wit", "stages": "policy_gradient"}, "reward must be one of -mse, -log_mse, -kl, got 'wit'"),
        ({"max_length": 5}, "max_length 5 leaves no position"),
        ({"min_position": 40, "max_length": 60}, "min_position"),
        ({"model": "no/such/folder"}, "cannot load"),
        ({"dataset": "nowhere.txt"}, "no text file"),
        ({"clones": "half"}, "clones must be one of"),
        ({"stages": "gumbel"}, "needs a warm_start stage"),
        ({"group_size": 1, "stages": "policy_gradient"}, "group_size must be at least 2"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(subject_folder, tmp_path, capsys, changes, message):
    assert main(flags(subject_folder, tmp_path, **changes)) == 2
    printed = capsys.readouterr().err.rstrip().splitlines()
    errors = [line for line in printed if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert printed[-1] == errors[0]  # the message is one line
    assert not list(tmp_path.rglob("model.safetensors"))


def test_an_empty_text_file_is_a_mistake(subject_folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n<|endoftext|>\n")
    assert main(flags(subject_folder, tmp_path, dataset=tmp_path / "empty.txt")) == 2
    assert "holds no text" in capsys.readouterr().err


def test_a_cache_of_another_layer_is_a_mistake(subject_folder, tmp_path, capsys):
    assert main(flags(subject_folder, tmp_path / "a", cache_dir=tmp_path / "cache")) == 0
    (tmp_path / "cache" / "activations-layer1").rename(tmp_path / "cache" / "activations-layer0")
    assert main(flags(subject_folder, tmp_path / "b", cache_dir=tmp_path / "cache", layer=0)) == 2
    message = capsys.readouterr().err
    assert "layer" in message and "1" in message and "0" in message


def test_activations_that_are_not_finite_are_a_mistake(subject_folder, tmp_path, capsys):
    folder = tmp_path / "broken"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert main(flags(folder, tmp_path / "run", dataset=subject_folder / "text.txt")) == 2
    assert "not finite" in capsys.readouterr().err


def test_lora_without_peft_is_a_mistake(subject_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    monkeypatch.setattr(recipe, "open_rows", None)  # found before the cache is built
    assert main(flags(subject_folder, tmp_path, clones="lora")) == 2
    assert 'pip install "consistency-lens[lora]"' in capsys.readouterr().err


def test_a_run_that_only_skips_steps_ends_with_one_line_and_exit_code_1(subject_folder, tmp_path, capsys):
    arguments = flags(subject_folder, tmp_path, learning_rate=1e30, max_steps=12, max_nonfinite_steps=3)
    assert main(arguments) == 1
    assert "3 steps in a row had gradients that are not finite" in capsys.readouterr().err.splitlines()[-1]


def with_stages(arguments, *stages):
    return [*arguments, "--stages", *stages]


def test_a_stage_may_be_measured_in_epochs(subject_folder, tmp_path):
    arguments = flags(subject_folder, tmp_path, max_steps=20)
    assert main(with_stages(arguments, "warm_start 0.5e", "policy_gradient")) == 0


def test_stages_longer_than_the_run_are_found_before_the_cache_is_built(subject_folder, tmp_path, capsys):
    assert main(with_stages(flags(subject_folder, tmp_path), "warm_start 100s", "policy_gradient")) == 2
    assert "the last would start at step 100 of 4" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
