"""Fits the tuned lens of a model by the recipe for short prompts, with two seeds, and judges each on both suites.

    python model_cards/measure_short_prompts.py MODEL TEXT

MODEL is a folder, TEXT a file of documents. Lenses go to outputs/tuned_lenses/short_prompts, where those that are
there are kept; the figures to model_cards/tuned_lens_short_prompts.json, from which `make cards` takes them.
"""

import sys
from pathlib import Path
from typing import Any

from consistency_lens.atomic_write import write_json
from consistency_lens.cli.parser import parse_arguments
from consistency_lens.tuned_lens.fit import fit_tuned_lens
from consistency_lens.tuned_lens.fit_arguments import FitArguments, TunedLensTrainingArguments
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.suite import read_suite
from consistency_lens.tuned_lens.sweep import judge_lens

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "examples/recipes/tuned_lens/short_prompts.yaml"
RUNS = ROOT / "outputs/tuned_lenses/short_prompts"
RESULT = ROOT / "model_cards/tuned_lens_short_prompts.json"
SEEDS = (316, 1)
SUITES = ("stories", "default")


def measure(model: str, text: str, seed: int, folder: Path) -> dict[str, Any]:
    """Held-out figures of one fit, and its KPIs and gates on each suite."""
    flags = ["--model", model, "--dataset", text, "--seed", str(seed), "--output_dir", str(folder)]
    arguments = ["--config", str(RECIPE), *flags, "--use_cpu", "true", "--disable_tqdm", "true"]
    result = fit_tuned_lens(*parse_arguments((FitArguments, TunedLensTrainingArguments), arguments))
    lens = TunedLens.from_pretrained(folder, base_model=model)
    judged = {}
    for suite in SUITES:
        judgement, _ = judge_lens(lens, read_suite(suite), suite, progress=False)
        judged[suite] = judgement.as_dict()
    return {"seed": seed, "metrics": result.metrics, "suites": judged}


def main() -> None:
    model, text = sys.argv[1:]
    runs = [measure(model, text, seed, RUNS / f"seed-{seed}") for seed in SEEDS]
    write_json(RESULT, {"model": Path(model).name, "text": Path(text).name, "runs": runs})


if __name__ == "__main__":
    main()
