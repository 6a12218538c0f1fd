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
from folded import folded
from matplotlib.figure import Figure
from speed_block import speed_block
from tuned_lens_block import tuned_lens_block

from consistency_lens import Explanation, TokenExplanation, plots
from consistency_lens.evaluation.report import check_markdown, control_rows, markdown_table, metrics_markdown
from consistency_lens.hub.lens_card import lens_card
from consistency_lens.hub.upstream_license import license_in_card
from consistency_lens.plots.chart import Chart, Line, Lines
from consistency_lens.plots.static import draw
from consistency_lens.tuned_lens.cards import CardPlace
from consistency_lens.tuned_lens.cards import lens_card as tuned_lens_card

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
SUBJECT = "examples/tiny_stories"
README = "README.md"
FOLDED = ("best_of_n", "text_length", "linear_probe")  # checks that a first reading can do without

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


def curves_of(runs: dict[str, Any]) -> Chart:
    """Held-out FVE over the minutes of training, one line a run."""
    lines = [
        Line(label, [seconds / 60 for _, seconds, _ in run["curve"]], [fve for *_, fve in run["curve"]])
        for label, run in runs.items()
    ]
    axes = Lines(
        "FVE on held-out rows (1 is perfect, 0 the mean activation)", "minutes of training, evaluation included",
        "FVE", lines,
    )  # fmt: skip
    return Chart("", [axes])


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": f"matplotlib {matplotlib.__version__}"})


def machine_of(run: dict[str, Any]) -> str:
    threads = run["machine"]["threads"]
    return f"{threads} thread{'s'[: threads > 1]} of a machine with {run['machine']['cpu_cores']} cores"


def demo_block(run: dict[str, Any], metrics: dict[str, Any]) -> str:
    """What `make demo` came to."""
    shown = {name: value for name, value in metrics.items() if name not in FOLDED}
    more = check_markdown({name: metrics[name] for name in FOLDED})
    return (
        f"Measured by `make demo` on held-out documents. Sampling the corpus, caching, training and evaluation took "
        f"{run['seconds'] / 60:.1f} minutes with {machine_of(run)}:\n\n{metrics_markdown(shown)}\n"
        f"{folded('More checks: best of n, text length, linear probe', more)}\n"
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
    """The card and the pictures of a lens that `make demo` trained."""
    folder = CARDS / name
    (target / name).mkdir(parents=True, exist_ok=True)
    (target / name / README).write_text(lens_card(folder, location=f"outputs/{name}"), encoding="utf-8")
    if (folder / "explanation.json").is_file():
        said = read_json(folder / "explanation.json")
        tokens = [TokenExplanation(**row) for row in said["tokens"]]
        save(plots.controls(folder), target / name / "controls.png")
        save(plots.explanation(Explanation(said["text"], tokens)), target / name / "explanation.png")


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
    save(draw(curves_of(objectives)), cards / "objectives.png")
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
