"""Renders what the repository shows of the embedded model's lenses: cards, pictures and the README's tables.

    make cards

reads what is kept in model_cards/ (by `make best`, `make objectives` and `make keep`) and of benchmarks, and nothing
else; writes the README.md of each lens there, pictures, and what stands in README.md and docs/speed.md between markers
such as `<!-- demo:begin -->` and `<!-- demo:end -->`. Every number comes from the runs' own files, and a test holds
that the files of the repository are those that this script writes.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from speed_block import speed_block
from tuned_lens_block import tuned_lens_block

from consistency_lens import Explanation, TokenExplanation
from consistency_lens.evaluation.report import control_rows, markdown_table, metrics_markdown
from consistency_lens.hub.lens_card import lens_card
from consistency_lens.hub.upstream_license import license_in_card
from consistency_lens.tuned_lens.cards import CardPlace
from consistency_lens.tuned_lens.cards import lens_card as tuned_lens_card

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
CAPTION = "Colour: FVE from 0 (dark) to 1 (bright)."
SUBJECT = "examples/tiny_stories"
README = "README.md"

# label -> what of a run's figures it shows, and its decimals
Column = tuple[Callable[[dict[str, Any]], float], int]
HEADLINE: dict[str, Column] = {
    "FVE": (lambda m: m["fve"], 3),
    "KL recovered": (lambda m: m["kl_recovered"], 3),
    "perplexity ratio": (lambda m: m["perplexity_ratio"], 2),
    "shuffled, FVE": (lambda m: m["controls"]["shuffled"]["fve"], 3),
}
FRESH: dict[str, Column] = {
    "fresh encoder, share of FVE": (lambda m: m["private_code"]["fresh_encoder"]["share_of_fve"], 2)
}


def draw(explanation: Explanation, path: Path) -> None:
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
    axes.text(0.0, len(rows) + 0.3, CAPTION, fontsize=8, color="dimgray", va="center")
    save(figure, path)


def shown(top: list[tuple[str, float]]) -> str:
    token, probability = top[0]
    return f"{token.strip() or repr(token)} {probability:.0%}"


def draw_curves(runs: dict[str, Any], path: Path) -> None:
    """Held-out FVE over the minutes of training, one line a run."""
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for (label, run), style in zip(runs.items(), ("-", ":", "-.", "-", "--"), strict=False):
        minutes, fve = [seconds / 60 for _, seconds, _ in run["curve"]], [value for *_, value in run["curve"]]
        axes.plot(minutes, fve, style, label=label, linewidth=2)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xlabel("minutes of training, evaluation included")
    axes.set_ylabel("FVE, held out")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": f"matplotlib {matplotlib.__version__}"})
    plt.close(figure)


def machine_of(run: dict[str, Any]) -> str:
    threads = run["machine"]["threads"]
    return f"{threads} thread{'s'[: threads > 1]} of a machine with {run['machine']['cpu_cores']} cores"


def demo_block(run: dict[str, Any], metrics: dict[str, Any]) -> str:
    """What `make demo` came to."""
    return (
        f"Measured by `make demo` on held-out documents. Sampling the corpus, caching, training and evaluation took "
        f"{run['seconds'] / 60:.1f} minutes with {machine_of(run)}:\n\n{metrics_markdown(metrics)}"
    )


def best_block(runs: dict[str, Any]) -> str:
    """The best recipe over its seeds."""
    columns = HEADLINE | FRESH
    metrics = [run["metrics"] for run in runs.values()]
    minutes = [run["seconds"] / 60 for run in runs.values()]
    rows = [
        [label, *(f"{read(of):.{decimals}f}" for read, decimals in columns.values()), f"{took:.1f}"]
        for label, of, took in zip(runs, metrics, minutes, strict=True)
    ]
    values = [[read(of) for of in metrics] for read, _ in columns.values()]
    spread = [
        f"{mean(of):.{decimals}f} ± {stdev(of):.{decimals}f}"
        for of, (_, decimals) in zip(values, columns.values(), strict=True)
    ]
    rows.append(["mean ± standard deviation", *spread, f"{mean(minutes):.1f}"])
    first = next(iter(runs.values()))
    controls = markdown_table(("reconstructed from", "FVE", "KL recovered"), control_rows(first["metrics"]))
    return (
        f"Measured by `make best`, each seed with a corpus of its own; T = {first['num_text_tokens']}, with "
        f"{machine_of(first)}:\n\n"
        f"{markdown_table(('', *columns, 'minutes'), rows)}\n\nThe controls of the first:\n\n{controls}\n"
    )


def objectives_block(runs: dict[str, Any]) -> str:
    """Each objective on its own, for about the same time."""
    columns = HEADLINE | {"fresh encoder, FVE": (lambda m: m["private_code"]["fresh_encoder"]["fve"], 3)}
    rows = [
        [
            label,
            *(f"{read(run['metrics']):.{decimals}f}" for read, decimals in columns.values()),
            f"{run['laps']['training'] / 60:.1f}",
        ]
        for label, run in runs.items()
    ]
    return (
        f"Measured by `make objectives`, on one corpus and cache with {machine_of(next(iter(runs.values())))}:\n\n"
        f"{markdown_table(('stages', *columns, 'minutes of training'), rows)}\n\n"
        "![Held-out FVE over the minutes of training, for each of these runs](model_cards/objectives.png)\n"
    )


def with_block(text: str, name: str, block: str) -> str:
    """A text with another block between the markers of a name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n<!-- written by model_cards/render.py -->\n{block}{end}{tail}"


def render_lens(name: str, target: Path) -> None:
    """The card and the picture of a lens that `make demo` trained."""
    folder = CARDS / name
    (target / name).mkdir(parents=True, exist_ok=True)
    (target / name / README).write_text(lens_card(folder, location=f"outputs/{name}"), encoding="utf-8")
    if (folder / "explanation.json").is_file():
        said = read_json(folder / "explanation.json")
        tokens = [TokenExplanation(**row) for row in said["tokens"]]
        draw(Explanation(said["text"], tokens), target / name / "explanation.png")


def render_tuned_lens(name: str, target: Path) -> None:
    """The card of the tuned lens that `make tuned-lens` fitted."""
    folder = CARDS / name
    config, provenance, metrics = (read_json(folder / f"{of}.json") for of in ("config", "provenance", "metrics"))
    place = CardPlace(provenance["model_id"], f"outputs/tuned_lenses/{provenance['clean_model_name']}")
    text = tuned_lens_card(place, config, provenance, metrics, license_in_card(str(ROOT / SUBJECT), None))
    (target / name).mkdir(parents=True, exist_ok=True)
    (target / name / README).write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def render(target: Path) -> None:
    """Writes README.md, docs/speed.md and model_cards/ below a folder, by default the repository itself."""
    cards = target / "model_cards"
    render_lens("tiny_stories", cards)
    render_tuned_lens("tuned_lens_tiny_stories", cards)
    best, objectives = read_json(CARDS / "best.json"), read_json(CARDS / "objectives.json")
    draw_curves(objectives, cards / "objectives.png")
    demo = CARDS / "tiny_stories"
    readme = {
        "demo": demo_block(read_json(demo / "run.json"), read_json(demo / "metrics.json")),
        "best": best_block(best),
        "objectives": objectives_block(objectives),
        "tuned_lens": tuned_lens_block(),
    }
    for page, blocks in {README: readme, "docs/speed.md": {"speed": speed_block()}}.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for name, block in blocks.items():
            text = with_block(text, name, block)
        (target / page).parent.mkdir(parents=True, exist_ok=True)
        (target / page).write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target", type=Path, default=ROOT, help="folder that README.md, docs/ and model_cards/ go to"
    )
    render(parser.parse_args().target)


if __name__ == "__main__":
    main()
