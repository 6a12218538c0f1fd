"""Keeps in model_cards/ what runs have left of the embedded model's lenses, as far as cards and README show it.

    make demo && make tuned-lens && make keep && make cards

copies figures, samples and records from outputs/tiny_stories and outputs/tuned_lenses/tiny_stories, if there,
and writes explanation.json, the demo's lens on one sentence, and, where there is a Chromium, report.png, a picture of
the run's report. `make cards` needs nothing else than these files.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path

from screenshot import find_chromium, take_picture
from transformers import AutoModel

import consistency_lens  # noqa: F401 - registers the models with transformers
from consistency_lens.cli.main import main as run_command

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
SENTENCE = "Once upon a time there was a little dog named Max. He loved to play in the park"
LENS_FILES = ("config.json", "provenance.json", "run.json", "metrics.json", "samples.jsonl", "log_history.json")
TUNED_LENS_FILES = ("config.json", "provenance.json", "metrics.json", "gates.json")
SWEEP_PICTURE = "sweep-overview.png"


def keep_lens(run: Path, target: Path) -> None:
    """The files of a lens that its card is written from, and its words for a sentence."""
    target.mkdir(exist_ok=True)
    for name in (*LENS_FILES, "emissions.csv"):
        if (run / name).is_file() or name in LENS_FILES:
            shutil.copy(run / name, target / name)
    explanation = AutoModel.from_pretrained(run).explain(SENTENCE).to_dict()
    (target / "explanation.json").write_text(json.dumps(explanation, indent=1, ensure_ascii=False) + "\n", "utf-8")
    chromium = find_chromium()
    if chromium is None:
        logging.warning("no Chromium here, so report.png stays as it is")
    elif run_command(["report", str(run)]) == 0:
        take_picture(run / "report.html", target / "report.png", chromium)


def keep_tuned_lens(run: Path, target: Path) -> None:
    """The files of a tuned lens that its card is written from, and the picture of its sweep."""
    target.mkdir(exist_ok=True)
    for name in TUNED_LENS_FILES:
        shutil.copy(run / name, target / name)
    shutil.copy(run / "sweep" / "plots" / SWEEP_PICTURE, target / SWEEP_PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lens", type=Path, default=ROOT / "outputs/tiny_stories")
    parser.add_argument("--tuned_lens", type=Path, default=ROOT / "outputs/tuned_lenses/tiny_stories")
    arguments = parser.parse_args()
    if not arguments.lens.is_dir() and not arguments.tuned_lens.is_dir():
        parser.error(f"nothing at {arguments.lens} or {arguments.tuned_lens}; run `make demo` or `make tuned-lens`")
    if arguments.lens.is_dir():
        keep_lens(arguments.lens, CARDS / "tiny_stories")
    if arguments.tuned_lens.is_dir():
        keep_tuned_lens(arguments.tuned_lens, CARDS / "tuned_lens_tiny_stories")


if __name__ == "__main__":
    main()
