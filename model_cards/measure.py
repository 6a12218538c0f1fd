"""Measures what the README shows beside the demo: the best recipe over three seeds, and each objective on its own.

    make best        # examples/recipes/tiny_stories_best.yaml with seeds 0, 1 and 2 (half an hour each at most)
    make objectives  # the demo's recipe with other stages, for the same time each

Runs go to outputs/, one folder each, and what is there already is not run again; their figures go to
model_cards/<name>.json, which `make cards` reads.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEST = "examples/recipes/tiny_stories_best.yaml"
DEMO = "examples/recipes/tiny_stories.yaml"

Runs = dict[str, list[str]]

# The steps are such that every run trains for about as long as the demo; the table has the seconds that it took.
COSINE, SECOND = "cosine 1 -> 0.1 warmup 50s", "cosine 0.5 -> 0.05 warmup 20s"
OBJECTIVES = {
    "warm start only": (["warm_start"], 3800, [COSINE]),
    "policy gradient, no warm start": (["policy_gradient"], 1150, [COSINE]),
    "warm start, then Gumbel": (["warm_start 2500s", "gumbel"], 2950, [COSINE, SECOND]),
    "warm start, then policy gradient": (["warm_start 2500s", "policy_gradient"], 2900, [COSINE, SECOND]),
    "warm start, Gumbel, policy gradient": (
        ["warm_start 2500s", "gumbel 200s", "policy_gradient"],
        2930,
        [COSINE, "constant 0.4", SECOND],
    ),
}


def best_runs() -> Runs:
    """The best recipe, once for each seed: lens, corpus and cache all come from the seed."""
    return {f"seed {seed}": ["--config", BEST, "--seed", str(seed)] for seed in range(3)}


def objective_runs() -> Runs:
    """The demo's recipe with other stages, on one corpus and cache."""
    common = ["--config", DEMO, "--cache_dir", str(ROOT / "outputs/objectives/data")]
    common += ["--eval_strategy", "steps", "--eval_steps", "100", "--sample_steps", "0"]
    runs: Runs = {}
    for name, (stages, steps, rates) in OBJECTIVES.items():
        reference = [] if stages[0].startswith("warm_start") else ["--lm_reference", "subject"]
        flags = ["--stages", *stages, "--max_steps", str(steps), "--learning_rate_schedule", *rates]
        runs[name] = [*common, *flags, *reference]
    return runs


def figures(folder: Path) -> dict[str, Any]:
    """What is kept of a run: its held-out figures, its seconds, and the held-out FVE during training."""
    files = (folder / f"{name}.json" for name in ("metrics", "run", "log_history"))
    metrics, run, log = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    metrics.pop("arguments")
    curve = [[entry["step"], entry["seconds"], entry["eval_fve"]] for entry in log if "eval_fve" in entry]
    kept = {name: run[name] for name in ("laps", "seconds", "machine")}
    return {"metrics": metrics, **kept, "curve": curve}


def measure(name: str, runs: Runs) -> None:
    """Runs what has not been run, one after the other, and writes the figures of all."""
    results = {}
    for label, flags in runs.items():
        folder = ROOT / "outputs" / name / label.replace(",", "").replace(" ", "_")
        if not (folder / "metrics.json").is_file():
            threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
            command = [sys.executable, "examples/train_lens.py", *flags, "--output_dir", str(folder)]
            subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, check=True)
        results[label] = {"flags": flags, **figures(folder)}
        path = ROOT / "model_cards" / f"{name}.json"
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("best", "objectives"))
    what = parser.parse_args().what
    measure(what, best_runs() if what == "best" else objective_runs())


if __name__ == "__main__":
    main()
