"""Writes the table of docs/speed.md, between its markers, from the results of the benchmarks.

    make bench

runs the benchmarks and this. Every number comes from the JSON files in tests/benchmarks/results.
"""

from pathlib import Path
from typing import Any

from render import ROOT, put_into_readme, read_json

from consistency_lens.evaluation.report import markdown_table

RESULTS, DOCUMENT = ROOT / "tests/benchmarks/results", ROOT / "docs/speed.md"
# The results of the page, in its order; one that has not been measured is left out.
NAMES = (
    "step_vs_reference", "step_vs_cached_reference", "step_vs_reference_k8", "step_memory_vs_reference",
    "kl_share_of_step", "step_vs_reference_tiny_stories", "step_vs_cached_reference_tiny_stories",
    "step_vs_reference_k8_tiny_stories", "step_memory_vs_reference_tiny_stories", "kl_share_of_step_tiny_stories",
    "kl_one_token", "kl_multi_position", "encoder_cut", "straight_through_time", "straight_through_memory",
    "shared_weights_memory", "explain_batched", "explain_vs_generate", "cache_vs_plain_loop", "cache_vs_bare_forward",
)  # fmt: skip


def quantity(value: float, unit: str) -> str:
    """A number with its unit, to three digits."""
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    return f"{value:.1%}" if unit == "of a step" else f"{value:.3g} {unit}"


def table(results: list[dict[str, Any]]) -> str:
    """The results as lines of a Markdown table, and where they were measured below it."""
    columns = ("benchmark", "what", "ours", "theirs", "ratio")
    rows = [
        (
            f"`{result['name']}`",
            result["what"],
            quantity(result["ours"], result["unit"]),
            quantity(result["theirs"], result["unit"]),
            f"{result['ratio']:.2f}",
        )
        for result in results
    ]
    places = {f"{r['machine']['device']}, {r['machine'].get('cores', '?')} cores": None for r in results}
    versions = {", ".join(f"{name} {version}" for name, version in r["versions"].items()): None for r in results}
    return (
        f"{markdown_table(columns, rows, numbers=False)}\n\nMeasured on {'; '.join(places)}; {'; '.join(versions)}.\n"
    )


def main() -> None:
    """Fills the page."""
    files = [RESULTS / f"{name}.json" for name in NAMES]
    results = [read_json(file) for file in files if file.is_file()]
    put_into_readme("speed", table(results), Path(__file__), DOCUMENT)


if __name__ == "__main__":
    main()
