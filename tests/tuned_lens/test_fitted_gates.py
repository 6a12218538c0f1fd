"""A small fit of the embedded model passes the gates that the KL decides, on both suites of prompts."""

from pathlib import Path

import pytest

from consistency_lens.tuned_lens.fit import fit_tuned_lens
from consistency_lens.tuned_lens.fit_arguments import FitArguments, TunedLensTrainingArguments
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.suite import read_suite
from consistency_lens.tuned_lens.sweep import judge_lens

MODEL = Path(__file__).parents[2] / "examples" / "tiny_stories"


@pytest.fixture(scope="module")
def lens(stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_stories")
    # short sequences, all of whose positions are read: the prompts are short, too
    args = FitArguments(
        model=str(MODEL), dataset=str(stories), tokens=45_056, ridge_tokens=32_768, seq_len=32, rank="full"
    )
    training = TunedLensTrainingArguments(
        output_dir=str(folder), position_range=[0.0, 1.0], positions_per_sequence="all", learning_rate=2e-3,
        eval_steps=500, save_steps=500, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    fit_tuned_lens(args, training)
    return TunedLens.from_pretrained(folder, base_model=str(MODEL))


@pytest.mark.parametrize("suite", ["default", "stories"])
def test_gates_a_c_and_d_pass(lens, suite):
    judgement, _ = judge_lens(lens, read_suite(suite), suite, num_resamples=2, progress=False)
    assert judgement.gates.failed(("A", "C", "D")) == [], judgement.kpis.as_dict()
