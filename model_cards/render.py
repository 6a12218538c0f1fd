"""Renders what the repository shows of the demo's lens: its card, its figures, the README's picture and table.

    make demo && make cards

reads outputs/tiny_stories and writes model_cards/tiny_stories/ and the part of README.md between the markers
`<!-- demo:begin -->` and `<!-- demo:end -->`. Every number comes from the run's own files.
"""

import argparse
import json
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformers import AutoModel

from consistency_lens import Explanation
from consistency_lens.evaluation.report import metrics_markdown

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
CAPTION = "Colour: FVE from 0 (dark) to 1 (bright). Positions before {} were not trained on."
SENTENCE = "Once upon a time there was a little dog named Max. He loved to play in the park"


def draw(explanation: Explanation, caption: str, path: Path) -> None:
    """A picture of an explanation: each token, its words, its FVE as colour, the predictions before and after."""
    rows = list(explanation)
    colours = matplotlib.colormaps["cividis"]
    figure, axes = plt.subplots(figsize=(11, 0.32 * len(rows) + 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) + 0.6, -1.2)
    columns = {
        "token": 0.0, "the lens's words": 0.13, "FVE": 0.52, "KL, nats": 0.59, "next, before": 0.71, "after": 0.86,
    }  # fmt: skip
    for title, x in columns.items():
        axes.text(x, -0.7, title, fontsize=10, fontweight="bold", va="center")
    for y, row in enumerate(rows):
        shade = colours(min(max(row.fve, 0.0), 1.0))
        ink = "black" if sum(shade[:3]) > 1.5 else "white"
        axes.text(
            0.0, y, row.token.strip() or repr(row.token), fontsize=10, va="center", color=ink, family="monospace",
            bbox={"facecolor": shade, "edgecolor": "none", "boxstyle": "round,pad=0.2"},
        )  # fmt: skip
        text = row.text.strip().replace("\n", "⏎")
        cells = (text, f"{row.fve:.2f}", f"{row.kl:.2f}", shown(row.top_before), shown(row.top_after))
        for x, cell in zip(list(columns.values())[1:], cells, strict=True):
            axes.text(x, y, cell, fontsize=10, va="center")
    axes.text(0.0, len(rows) + 0.3, caption, fontsize=8, color="dimgray", va="center")
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def shown(top: list[tuple[str, float]]) -> str:
    token, probability = top[0]
    return f"{token.strip() or repr(token)} {probability:.0%}"


def readme_block(metrics: dict) -> str:
    """The measured part of the README."""
    run = json.loads((ROOT / "model_cards/tiny_stories/run.json").read_text(encoding="utf-8"))
    machine = f"{run['machine']['threads']} threads of a machine with {run['machine']['cpu_cores']} cores"
    return (
        f"{BEGIN}\n<!-- written by model_cards/render.py from outputs/tiny_stories -->\n"
        f"Measured by `make demo` on held-out documents. Sampling the corpus, caching, training and evaluation took "
        f"{run['seconds'] / 60:.1f} minutes with {machine}:\n\n{metrics_markdown(metrics)}{END}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs/tiny_stories")
    run = parser.parse_args().run
    target = ROOT / "model_cards/tiny_stories"
    target.mkdir(exist_ok=True)
    for name in ("README.md", "metrics.json", "samples.jsonl", "run.json"):
        shutil.copy(run / name, target / name)
    lens = AutoModel.from_pretrained(run)
    caption = CAPTION.format(lens.provenance["recipe"]["min_position"])
    draw(lens.explain(SENTENCE), caption, target / "explanation.png")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    block = readme_block(json.loads((run / "metrics.json").read_text()))
    (ROOT / "README.md").write_text(head + block + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
