"""`consistency-lens tuned-lens eval`: a saved lens on the text that was held out from its fit, and on another."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_models import NUM_LAYERS, WIDTH, tiny_model
from tuned_fits import SEQ_LEN, run_fit, write_inputs

from consistency_lens.cli.main import main

# of the text of the fit, with its seed and its split: the documents that were held out from it
SAME_TEXT = ("--seq_len", "16", "--tokens", "64", "--validation_fraction", "0.2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def fitted(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "lens"
    run_fit(inputs, folder, num_train_epochs=1)
    return folder


@pytest.fixture
def lens(fitted, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(fitted, tmp_path / "lens")


def evaluate(lens, *flags):
    return main(["tuned-lens", "eval", "--lens", str(lens), "--device", "cpu", "--disable_tqdm", *map(str, flags)])


def read(path):
    return json.loads(path.read_text())


def test_of_the_fits_own_text_it_says_what_the_fit_said(lens, capsys):
    assert evaluate(lens) == 0
    found, fit = read(lens / "evaluation" / "metrics.json"), read(lens / "metrics.json")
    # all positions, as the fit was told, and not those from 60 to 95 %
    assert found["positions"] == fit["positions"] == 4 * SEQ_LEN
    for name in ("tuned", "norm", "calibrated"):
        assert found["kl"][name] == pytest.approx(fit["kl"][name], rel=1e-6)
    assert found["dataset"] == read(lens / "blocks" / "blocks.json")["dataset"]
    printed = capsys.readouterr().out
    assert f"{found['mean_kl']['tuned'] / np.log(2):.3f}" in printed and "norm lens, calibrated" in printed
    assert str(lens / "evaluation" / "metrics.json") in printed
    assert read(lens / "evaluation" / "arguments.json")["lens"] == str(lens)


def test_the_figures_of_a_fit_in_bfloat16_are_those_of_float32(inputs, tmp_path):
    folder = tmp_path / "lens"
    run_fit(inputs, folder, num_train_epochs=1, head_dtype="bfloat16")
    assert read(folder / "provenance.json")["schedule"]["head_dtype"] == "bfloat16"
    assert evaluate(folder) == 0
    found, fit = read(folder / "evaluation" / "metrics.json"), read(folder / "metrics.json")
    for name in ("tuned", "norm", "calibrated"):
        assert fit["kl"][name] == pytest.approx(found["kl"][name], rel=1e-6)


def test_positions_are_those_that_are_asked_for(lens):
    assert evaluate(lens, "--position_range", 0.5, 1, "--positions_per_sequence", 3) == 0
    assert read(lens / "evaluation" / "metrics.json")["positions"] == 4 * 3
    assert evaluate(lens, "--position_range", 0.5, 1, "--positions_per_sequence", "all") == 0
    assert read(lens / "evaluation" / "metrics.json")["positions"] == 4 * SEQ_LEN / 2


def test_of_a_text_the_held_out_documents_are_read(inputs, lens, tmp_path):
    shutil.rmtree(lens / "blocks")  # as of a lens that was downloaded
    folder = tmp_path / "figures"
    text = ("--dataset", inputs / "text.jsonl", "--output_dir", folder, *SAME_TEXT)
    assert evaluate(lens, *text) == 0
    found = read(folder / "metrics.json")
    assert found["positions"] == 4 * (15 - 9)  # from 60 to 95 % of 16
    assert found["tokens"] == 64 and found["dataset"]["repo_id"] == str(inputs / "text.jsonl")
    assert evaluate(lens, *text, "--position_range", 0, 1) == 0
    fit = read(lens / "metrics.json")
    assert read(folder / "metrics.json")["kl"]["tuned"] == pytest.approx(fit["kl"]["tuned"], rel=1e-6)


def test_figures_of_a_model_that_was_not_compared_are_not_the_lenss_own(inputs, lens, tmp_path, capsys):
    other, own = shutil.copytree(inputs / "subject", tmp_path / "other"), (lens / "metrics.json").read_bytes()
    tiny_model("llama", seed=7).save_pretrained(other)
    asked = ("--model", other, "--dtype", "bfloat16")
    assert evaluate(lens, *asked, "--output_dir", lens) == 2
    assert "load it in float32, or pass another --output_dir" in capsys.readouterr().err
    assert (lens / "metrics.json").read_bytes() == own
    assert evaluate(lens, *asked) == 0
    assert evaluate(lens, "--model", inputs / "subject", "--output_dir", lens) == 0


def test_a_lens_of_others_is_read_without_temperatures_of_its_own(inputs, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    sizes = {"base_model_name_or_path": str(inputs / "subject"), "d_model": WIDTH, "num_hidden_layers": NUM_LAYERS}
    (theirs / "config.json").write_text(json.dumps(sizes))
    zeros = {f"{i}.weight": torch.zeros(WIDTH, WIDTH) for i in range(NUM_LAYERS)}
    torch.save(zeros | {f"{i}.bias": torch.zeros(WIDTH) for i in range(NUM_LAYERS)}, theirs / "params.pt")
    assert evaluate(theirs, "--dataset", inputs / "text.jsonl", *SAME_TEXT) == 0
    found = read(theirs / "evaluation" / "metrics.json")
    assert list(found["kl"]) == ["tuned", "norm"] and found["kl"]["tuned"] == pytest.approx(found["kl"]["norm"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--position_range", "0.9"), "position_range must be two shares of the context, got [0.9]; 0.6 0.95"),
        (("--position_range", "0.9", "0.1"), "position_range must be two shares of the context, got [0.9, 0.1]"),
        (("--positions_per_sequence", "0"), "positions_per_sequence must be a whole number above 0 or all, got '0'"),
        (("--batch_size", "0"), "batch_size must be at least 1, got 0"),
        (("--seed", "-1"), "seed must be 0 or more, got -1"),
        (("--dataset", "text.txt", "--tokens", "511"), "tokens: got 511, less than one sequence of 512; raise it"),
        (("--dataset", ""), "dataset: got none; pass it"),
        (("--lens", ""), "lens: got none; pass the folder of a lens"),
        (("--lens", "nowhere"), "lens: no tuned lens at 'nowhere'; pass the folder of one"),
    ],
)
def test_mistakes_end_in_one_line(lens, capsys, flags, message):
    assert evaluate(lens, *flags) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (lens / "evaluation").exists()


def test_a_lens_without_text_of_its_own_asks_for_one(lens, capsys):
    shutil.rmtree(lens / "blocks")
    assert evaluate(lens) == 2
    said = capsys.readouterr().err
    assert f"error: dataset: got none, and '{lens}' has no text that was held out from its fit; pass one" in said
