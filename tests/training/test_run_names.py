import re
import time
from pathlib import Path

import pytest

from consistency_lens.training.arguments import ConsistencyLensTrainingArguments
from consistency_lens.training.run_names import name_run, run_name, short_name
from consistency_lens.training.tracking import TrackedRun, write_run

STARTED = time.strptime("2026-03-01 14:05:09", "%Y-%m-%d %H:%M:%S")


@pytest.mark.parametrize(
    ("dataset", "model", "rate", "name"),
    [
        ("roneneldan/TinyStories", "openai-community/gpt2", 2e-4, "TinyStories_gpt2_L6_lr2e-4_20260301-140509"),
        ("/data/my corpus.txt", "./models/a_b/", 2.5e-3, "my-corpus_a-b_L6_lr2.5e-3_20260301-140509"),
        (None, "EleutherAI/pythia-70m", 1.0, "sampled_pythia-70m_L6_lr1e0_20260301-140509"),
    ],
)
def test_a_run_is_named_after_what_it_does(dataset, model, rate, name):
    assert run_name(dataset, model, 6, rate, STARTED) == name


@pytest.mark.parametrize(("source", "name"), [("a/../..", "unnamed"), ("é:ü/ÄÖ", "unnamed"), ("x/café (1)", "caf-1")])
def test_names_hold_nothing_that_a_file_system_refuses(source, name):
    assert short_name(source) == name


def arguments(**settings):
    return ConsistencyLensTrainingArguments(use_cpu=True, **settings)


def named(args, resume=None):
    name_run(args, "corpus.txt", "gpt2", 3, resume)
    return args.run_name, args.output_dir


def test_a_run_that_names_no_folder_makes_one():
    name, folder = named(arguments())
    assert re.fullmatch(r"corpus_gpt2_L3_lr5e-5_\d{8}-\d{6}", name)
    assert Path(folder) == Path("outputs") / name


def test_what_was_asked_for_stays():
    assert named(arguments(run_name="mine", output_dir="here")) == ("mine", "here")
    assert named(arguments(run_name="mine"))[1] == str(Path("outputs") / "mine")


def test_a_resumed_run_keeps_its_name_and_its_folder(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-5"
    write_run(TrackedRun("before", "id"), checkpoint)
    assert named(arguments(), str(checkpoint)) == ("before", str(tmp_path / "run"))
    assert named(arguments(output_dir="other"), str(checkpoint)) == ("before", "other")
    assert named(arguments(run_name="mine"), str(checkpoint))[0] == "mine"
