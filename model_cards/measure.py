"""Measures what the README shows beside the demo: the best recipe over three seeds, and each objective on its own.

    make best        # examples/recipes/tiny_stories_best.yaml with seeds 0, 1 and 2 (half an hour each at most)
    make objectives  # the demo's recipe with other stages, for the same time each

`JOBS=2` runs two at a time, with half of the cores each.

Runs go to outputs/, one folder each, and what is there already is not run again; their figures go to
model_cards/<name>.json, which `make cards` reads.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEST = "examples/recipes/tiny_stories_best.yaml"
DEMO = "examples/recipes/tiny_stories.yaml"

Runs = dict[str, list[str]]

# The steps are such that every run trains for about as long; the table has the minutes that it took.
FIRST, SECOND = "cosine 1 -> 0.1 warmup 50s", "cosine 0.5 -> 0.05 warmup 20s"
OBJECTIVES = {
    "warm start only": (["warm_start"], 3600, [FIRST]),
    "policy gradient, no warm start": (["policy_gradient"], 800, [FIRST]),
    "warm start, then Gumbel": (["warm_start 2000s", "gumbel"], 2350, [FIRST, SECOND]),
    "warm start, then policy gradient": (["warm_start 2000s", "policy_gradient"], 2350, [FIRST, SECOND]),
    "warm start, Gumbel, policy gradient": (
        ["warm_start 2000s", "gumbel 150s", "policy_gradient"],
        2350,
        [FIRST, "cosine 0.5 -> 0.25 warmup 20s", "cosine 0.4 -> 0.05"],
    ),
}
EVALUATIONS = 12  # of a few held-out rows during each training, for its curve


def best_runs() -> Runs:
    """The best recipe, once for each seed: lens, corpus and cache all come from the seed."""
    return {f"seed {seed}": ["--config", BEST, "--seed", str(seed)] for seed in range(3)}


def objective_runs() -> Runs:
    """The demo's recipe with other stages, on one corpus and cache."""
    common = ["--config", DEMO, "--cache_dir", str(ROOT / "outputs/tiny_stories/data")]  # the demo's own
    common += ["--eval_strategy", "steps", "--sample_steps", "0"]
    runs: Runs = {}
    for name, (stages, steps, rates) in OBJECTIVES.items():
        reference = [] if stages[0].startswith("warm_start") else ["--lm_reference", "subject"]
        flags = ["--stages", *stages, "--max_steps", str(steps), "--eval_steps", str(steps // EVALUATIONS)]
        flags += ["--learning_rate_schedule", *rates]
        runs[name] = [*common, *flags, *reference]
    return runs


def figures(folder: Path) -> dict[str, Any]:
    """What is kept of a run: its held-out figures, its seconds, and the held-out FVE during training."""
    files = (folder / f"{name}.json" for name in ("metrics", "run", "log_history"))
    metrics, run, log = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    metrics.pop("arguments")
    curve = [[entry["step"], entry["seconds"], entry["eval_fve"]] for entry in log if "eval_fve" in entry]
    kept = {name: run[name] for name in ("laps", "seconds", "machine")}
    return {"num_text_tokens": run["recipe"]["num_text_tokens"], "metrics": metrics, **kept, "curve": curve}


def run(folder: Path, flags: list[str], threads: int) -> None:
    """Trains and evaluates one lens, unless that has been done with the same flags and recipe.

    What it says goes to the folder's `log.txt`.
    """
    asked = json.dumps({"flags": flags, "recipe": (ROOT / flags[1]).read_text(encoding="utf-8")})
    of_last = folder / "asked.json"
    if (folder / "metrics.json").is_file() and of_last.is_file() and of_last.read_text(encoding="utf-8") == asked:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    of_last.write_text(asked, encoding="utf-8")
    command = [sys.executable, "examples/train_lens.py", *flags, "--output_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=log, stderr=subprocess.STDOUT)


def measure(name: str, runs: Runs, jobs: int) -> None:
    """Runs what has not been run, `jobs` at a time, and writes the figures of all."""
    folders = {label: ROOT / "outputs" / name / label.replace(",", "").replace(" ", "_") for label in runs}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        done = [pool.submit(run, folders[label], flags, threads) for label, flags in runs.items()]
        for finished in done:
            finished.result()
    results = {label: {"flags": runs[label], **figures(folder)} for label, folder in folders.items()}
    text = json.dumps(results, indent=1) + "\n"
    (ROOT / "model_cards" / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("best", "objectives"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    arguments = parser.parse_args()
    measure(arguments.what, best_runs() if arguments.what == "best" else objective_runs(), arguments.jobs)


if __name__ == "__main__":
    main()
