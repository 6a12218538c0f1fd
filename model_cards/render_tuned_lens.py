"""Renders what the repository shows of the embedded model's tuned lens: its figures, pictures and the README's part.

    make tuned-lens && make tuned-lens-card

reads outputs/tuned_lenses/tiny_stories, as fit, gates, sweep and plot have left it, and writes
model_cards/tuned_lens_tiny_stories/ and what stands between the markers `<!-- tuned_lens:begin -->` and
`<!-- tuned_lens:end -->` of README.md. Every number comes from the run's own files.
"""

import shutil
from pathlib import Path
from typing import Any

from render import CARDS, ROOT, put_into_readme, read_json

from consistency_lens.evaluation.report import markdown_table
from consistency_lens.tuned_lens.depth import DEPTHS
from consistency_lens.tuned_lens.gates import LEAST_DELTA_BITS
from consistency_lens.tuned_lens.held_out import BITS
from consistency_lens.tuned_lens.kpis import DELTA
from consistency_lens.tuned_lens.tables import gates_markdown

RUN = ROOT / "outputs/tuned_lenses/tiny_stories"
TARGET = CARDS / "tuned_lens_tiny_stories"
KEPT = ("metrics.json", "provenance.json", "gates.json")
PICTURE = "sweep-overview.png"
RESULTS = ROOT / "tests/benchmarks/results"
PEER_RESULTS = {
    "tuned_lens_time_to_peer_kl": "seconds to its final KL",
    "tuned_lens_kl_equal_tokens": "nats of KL at equal tokens",
    "tuned_lens_memory": "bytes that the fit adds",
}
SHORT_PROMPTS = CARDS / "tuned_lens_short_prompts.json"
LENSES = {"norm": "norm lens", "calibrated": "norm lens, calibrated", "tuned": "tuned lens"}


def kl_table(metrics: dict[str, Any]) -> str:
    """Held-out KL of every layer and the mean, in bits."""
    kl, mean = metrics["kl"], metrics["mean_kl"]
    rows = [(str(layer), *(f"{kl[name][layer] * BITS:.3f}" for name in LENSES)) for layer in range(len(kl["tuned"]))]
    rows.append(("mean", *(f"{mean[name] * BITS:.3f}" for name in LENSES)))
    return markdown_table(("layer", *LENSES.values()), rows)


def comparison() -> str:
    """The benchmark's results: ours beside the peer's."""
    rows = []
    for name, label in PEER_RESULTS.items():
        result = read_json(RESULTS / f"{name}.json")
        rows.append((label, f"{result['theirs']:.3g}", f"{result['ours']:.3g}", f"{result['ratio']:.2f}"))
    table = markdown_table(("", "tuned-lens 0.2.0", "here", "ratio"), rows)
    return (
        "Beside [tuned-lens](https://pypi.org/project/tuned-lens/) at its own learning rate, on the same 262,144 "
        f"tokens of this model (`python tests/benchmarks/tuned_lens_vs_peer.py`; above 1 is better here):\n\n{table}\n"
    )


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
        f"{tokens['ridge'] + tokens['training']:,} tokens through the model, in short sequences that start with BOS "
        f"as prompts do. Median bits of KL below the norm lens's, least and most of {len(runs)} seeds, each of which "
        f"passes gates {', '.join(passed)} on both suites:\n\n"
        f"{markdown_table(('suite', 'ΔKL', 'asked for'), rows)}\n"
    )


def block(metrics: dict[str, Any], gates: dict[str, Any]) -> str:
    """What the README says of the run."""
    tokens, seconds = metrics["tokens"], metrics["seconds"]
    fitting = seconds["ridge"] + seconds["training"]
    return (
        f"Measured by `make tuned-lens` on the embedded model (4 blocks; the last one is the model itself). "
        f"{tokens['ridge'] + tokens['training']:,} tokens of its own text went through it; the fit took "
        f"{fitting:.0f} seconds, writing the text {seconds['text']:.0f}. Bits of KL(P_final ‖ P_layer) on "
        f"{metrics['positions']:,} positions of held-out text:\n\n{kl_table(metrics)}\n\n"
        f"The gates, on the suite `{gates['arguments']['suite']}`:\n\n"
        f"{gates_markdown(gates['kpis'], gates['acceptance'])}\n\n"
        f"![KL, rank of the answer, cosine and KL gained against depth, for the norm lens and the tuned lens]"
        f"(model_cards/{TARGET.name}/{PICTURE})\n\n"
        f"{short_prompts(read_json(SHORT_PROMPTS))}\n{comparison()}"
    )


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    for name in KEPT:
        shutil.copy(RUN / name, TARGET / name)
    shutil.copy(RUN / "sweep" / "plots" / PICTURE, TARGET / PICTURE)
    put_into_readme(
        "tuned_lens", block(read_json(RUN / "metrics.json"), read_json(RUN / "gates.json")), Path(__file__)
    )


if __name__ == "__main__":
    main()
