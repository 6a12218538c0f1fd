"""What the README says of the embedded model's tuned lens, from model_cards/tuned_lens_tiny_stories and benchmarks."""

import json
from pathlib import Path
from typing import Any

from folded import folded

from consistency_lens.evaluation.report import markdown_table
from consistency_lens.tuned_lens.depth import DEPTHS
from consistency_lens.tuned_lens.gates import LEAST_DELTA_BITS
from consistency_lens.tuned_lens.kpis import DELTA
from consistency_lens.tuned_lens.tables import (
    GATE_COLUMNS,
    KPI_COLUMNS,
    caption,
    gate_rows,
    kl_markdown,
    kpi_rows,
)

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "model_cards/tuned_lens_tiny_stories"
PICTURE = "sweep-overview.png"
RESULTS = ROOT / "tests/benchmarks/results"
PEER_RESULTS = {
    "tuned_lens_time_to_peer_kl": "seconds to its final KL",
    "tuned_lens_kl_equal_tokens": "nats of KL at equal tokens",
    "tuned_lens_memory": "MiB that the fit adds",
}
SHORT_PROMPTS = ROOT / "model_cards/tuned_lens_short_prompts.json"
SCALES = {"tuned_lens_memory": 2**20}
# by the suffixes of the results' names: the peer at its defaults, and at settings that were chosen for it
PEERS = {"": "", "_tuned_peer": ", peer tuned"}
PEER_MODELS = {"": "A model of 7 million parameters", "_embedded": "The embedded model"}
SUBJECT = "after as many tokens, "  # what a result says before it names the model


def peer_table(suffix: str) -> str:
    """The benchmark on one model: ours beside the peer's, and beside the peer with settings chosen for it."""
    rows = []
    for peer, of_peer in PEERS.items():
        for name, label in PEER_RESULTS.items():
            path = RESULTS / f"{name}{suffix}{peer}.json"
            if path.is_file():
                result = read_json(path)
                figures = (f"{result[side] / SCALES.get(name, 1):.3g}" for side in ("theirs", "ours"))
                rows.append((f"{label}{of_peer}", *figures, f"{result['ratio']:.2f}", str(result["runs"])))
    return markdown_table(("", "tuned-lens 0.2.0", "here", "ratio", "runs"), rows)


def conditions(suffix: str) -> str:
    """What the benchmark measured and how, in its own words."""
    what = read_json(RESULTS / f"tuned_lens_kl_equal_tokens{suffix}.json")["what"]
    return what[what.index(SUBJECT) + len(SUBJECT) :]


def comparison() -> str:
    """Both models of the benchmark."""
    text = (
        "Beside [tuned-lens](https://pypi.org/project/tuned-lens/) by its own loop, on the same text of the model "
        "(`python tests/benchmarks/tuned_lens_vs_peer.py`; ratios above 1 are better here).\n"
    )
    for suffix, title in PEER_MODELS.items():
        if (RESULTS / f"tuned_lens_kl_equal_tokens{suffix}.json").is_file():
            text += f"\n{title}: {conditions(suffix)}.\n\n{peer_table(suffix)}\n"
    return text


def short_prompts(result: dict[str, Any]) -> str:
    """What another model's lens gains by the recipe for short prompts, see `measure_short_prompts.py`."""
    runs = result["runs"]
    rows = []
    for suite in runs[0]["suites"]:
        kpis = [run["suites"][suite]["kpis"] for run in runs]
        for index, (depth, least) in enumerate(zip(DEPTHS, LEAST_DELTA_BITS, strict=True)):
            values = [of[DELTA][index] for of in kpis]
            label = f"`{suite}`, {depth} % depth (layer {kpis[0]['layers@{25,50,75}%'][index]})"
            rows.append((label, f"{min(values):.2f} to {max(values):.2f}", f"A: ≥ {least:g}"))
    verdicts = [judged["acceptance"] for run in runs for judged in run["suites"].values()]
    passed = [letter for letter in "ABCD" if all(verdict[f"gate_{letter}"] for verdict in verdicts)]
    tokens = runs[0]["metrics"]["tokens"]
    return (
        f"For a story model made by others (`{result['model']}`, {kpis[0]['num_layers']} blocks) the recipe "
        f"[`short_prompts.yaml`](examples/recipes/tuned_lens/short_prompts.yaml) puts "
        f"{tokens['ridge'] + tokens['training']:,} tokens of `{result['text']}` through the model, counting each "
        f"epoch, in short sequences that start with BOS as prompts do (`python model_cards/measure_short_prompts.py "
        f"MODEL TEXT`). Median bits of KL below the norm lens's, least and most of {len(runs)} seeds, each of which "
        f"passes gates {', '.join(passed)} on both suites:\n\n"
        f"{markdown_table(('suite', 'ΔKL', 'asked for'), rows)}\n"
    )


def tuned_lens_block() -> str:
    """What the README says of the run."""
    metrics, gates = read_json(KEPT / "metrics.json"), read_json(KEPT / "gates.json")
    tokens, seconds = metrics["tokens"], metrics["seconds"]
    fitting = seconds["ridge"] + seconds["training"]
    return (
        f"Measured by `make tuned-lens` on the embedded model (4 blocks; the last one is the model itself). "
        f"{tokens['ridge'] + tokens['training']:,} tokens of its own text went through it; the fit took "
        f"{fitting:.0f} seconds, writing the text {seconds['text']:.0f}. Bits of KL(P_final ‖ P_layer) on "
        f"{metrics['positions']:,} positions of held-out text:\n\n{kl_markdown(metrics)}\n\n"
        f"The gates, on the suite `{gates['arguments']['suite']}` ({caption(gates['kpis'])}):\n\n"
        f"{markdown_table(GATE_COLUMNS, gate_rows(gates['acceptance']), numbers=False)}\n\n"
        f"{folded('The figures that the gates judge', markdown_table(KPI_COLUMNS, kpi_rows(gates['kpis'])))}\n\n"
        f"![KL, rank of the answer, cosine and KL gained against depth, for the norm lens and the tuned lens]"
        f"(model_cards/{KEPT.name}/{PICTURE})\n\n"
        f"{comparison()}\n{folded('A story model made by others', short_prompts(read_json(SHORT_PROMPTS)))}\n"
    )


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
