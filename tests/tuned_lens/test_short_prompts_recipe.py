"""A lens by the recipe for short prompts passes the gates that the KL decides, on a story model made by others."""

from pathlib import Path

import pytest

from consistency_lens.cli.parser import parse_arguments
from consistency_lens.tuned_lens.fit import fit_tuned_lens
from consistency_lens.tuned_lens.fit_arguments import FitArguments, TunedLensTrainingArguments
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.suite import read_suite
from consistency_lens.tuned_lens.sweep import judge_lens

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "tuned_lens" / "short_prompts.yaml"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lens(stories260k, stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories260k")
    flags = {"model": stories260k, "dataset": stories, "output_dir": folder, "disable_tqdm": True, "use_cpu": True}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    fit_tuned_lens(*parse_arguments((FitArguments, TunedLensTrainingArguments), ["--config", str(RECIPE), *words]))
    return TunedLens.from_pretrained(folder, base_model=str(stories260k))


@pytest.mark.parametrize("suite", ["default", "stories"])
def test_gates_a_c_and_d_pass(lens, suite):
    judgement, _ = judge_lens(lens, read_suite(suite), suite, num_resamples=2, progress=False)
    assert judgement.gates.failed(("A", "C", "D")) == [], judgement.kpis.as_dict()
