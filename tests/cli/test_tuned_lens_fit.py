import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tuned_fits import ACCUMULATION, BATCH, artifact, flags, write_inputs

from consistency_lens.cli.main import main

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="several processes on the CPU")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def fit(inputs, folder, *more, **changes):
    return main(["tuned-lens", "fit", *flags(inputs, folder, **changes), *more])


def test_it_fits_a_lens_and_then_keeps_it(inputs, tmp_path, capsys):
    folder = tmp_path / "lens"
    assert fit(inputs, folder) == 0
    printed = capsys.readouterr()
    assert "KL(P_final || P_layer) on held-out text, 64 positions" in printed.out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"{metrics['mean_kl']['tuned'] / 0.6931472:.3f}" in printed.out
    assert f"The lens lies in {folder} (figures: metrics.json" in printed.out
    assert "{'" not in printed.out + printed.err and "pin_memory" not in printed.err
    before = artifact(folder)
    assert fit(inputs, folder, rank="8") == 0
    kept = f"{folder} has a fitted lens (of rank '4', now '8'), which is kept; pass --force to fit it anew"
    assert kept in capsys.readouterr().out and artifact(folder) == before
    assert fit(inputs, folder, "--force", rank="8", max_steps=1) == 0
    assert "kept" not in capsys.readouterr().out and artifact(folder) != before


def test_a_mistake_is_one_line_and_exit_code_2(inputs, tmp_path, capsys):
    assert fit(inputs, tmp_path / "lens", rank="33") == 2
    assert "error: rank must lie in 1..32" in capsys.readouterr().err
    assert fit(inputs, tmp_path / "lens", "--learning_rat", "1") == 2
    assert "--learning_rat: unknown; did you mean --learning_rate?" in capsys.readouterr().err


def test_the_folder_is_named_after_the_model(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = flags(inputs, tmp_path, max_steps=1)
    where = words.index("--output_dir")
    assert main(["tuned-lens", "fit", *words[:where], *words[where + 2 :]]) == 0
    assert (tmp_path / "tuned_lenses" / "subject" / "provenance.json").is_file()


# in processes of their own


@on_cpu
@pytest.mark.slow
def test_fits_killed_at_random_moments_end_as_one_that_was_not(inputs, tmp_path):
    seed = random.randrange(2**32)
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_fits.py")), str(inputs), str(tmp_path), "12", str(seed)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, (seed, finished.stderr[-3000:])
    result = json.loads(finished.stdout.splitlines()[-1])
    for number in range(result["folders"]):
        assert artifact(tmp_path / str(number)) == artifact(tmp_path / "whole"), seed


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_two_processes_fit_what_one_does(inputs, tmp_path, name):
    settings = {"translator_optim": name, "num_train_epochs": 1}
    # 32 blocks to train on, pools of 8: several processes leave out a short last one
    settings |= {"ridge_tokens": 20 * 16, "layers_per_step": "1", "max_grad_norm": 0.1}
    assert fit(inputs, tmp_path / "one", **settings) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "consistency_lens", "tuned-lens", "fit"]
    command += flags(inputs, tmp_path / "two", **settings, per_device_train_batch_size=BATCH // 2)
    finished = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    one, two = (load_file(tmp_path / which / "model.safetensors") for which in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-6, msg=key)
    one, two = (json.loads((tmp_path / which / "provenance.json").read_text()) for which in ("one", "two"))
    assert two["batching"]["effective_batch_seqs"] == BATCH * ACCUMULATION == one["batching"]["effective_batch_seqs"]
    assert two["tokens_consumed"] == one["tokens_consumed"]
    key = "val_kl_bits@{25,50,75}%"
    assert two[key] == pytest.approx(one[key], abs=1e-6)
    assert finished.stdout.count("The lens lies in") == 1
