"""What docs/speed.md says was measured, from the results of the benchmarks (`make bench`)."""

import json
from pathlib import Path
from typing import Any

from consistency_lens.evaluation.report import markdown_table

RESULTS = Path(__file__).resolve().parent.parent / "tests/benchmarks/results"
# The results of the page, in its order; one that has not been measured is left out.
OF_A_STEP = (
    "step_flops_vs_reference", "step_flops_vs_cached_reference", "step_flops_vs_reference_k8",
    "step_flops_vs_cached_reference_k8", "step_flops_vs_reference_last", "step_flops_vs_cached_reference_last",
    "step_vs_reference", "step_vs_cached_reference", "step_vs_reference_larger_batch", "step_vs_reference_k8",
    "step_vs_reference_larger_batch_k8", "step_memory_vs_reference", "step_memory_of_larger_batch",
    "step_memory_vs_reference_k8", "step_memory_of_larger_batch_k8", "kl_share_of_step",
)  # fmt: skip
NAMES = (
    *OF_A_STEP, *(f"{name}_tiny_stories" for name in OF_A_STEP),
    "kl_one_token", "kl_multi_position", "kl_context_attention", "encoder_cut", "straight_through_time",
    "straight_through_memory", "table_product", "adapters_at_once", "adapters_at_once_wide",
    "rounded_weights_memory",
    "logits_in_chunks_flops", "logits_in_chunks_memory",
    "logits_in_chunks_flops_tiny_stories", "logits_in_chunks_memory_tiny_stories", "shared_weights_memory",
    "explain_batched", "explain_vs_generate", "cache_vs_plain_loop", "cache_vs_bare_forward",
    "step_bytes_on_paper_1b", "step_bytes_on_paper_1b_policy_gradient",
    "step_bytes_on_paper_7b", "step_bytes_on_paper_7b_policy_gradient",
    "step_flops_on_paper_1b", "step_flops_on_paper_7b",
    "step_flops_vs_reference_on_paper_1b", "step_flops_vs_reference_on_paper_7b",
)  # fmt: skip


def quantity(value: float, unit: str) -> str:
    """A number with its unit, to three digits."""
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if unit.startswith("FLOPs"):
        count = f"{value / 1e12:.3g} TFLOP" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP"
        return count + unit.removeprefix("FLOPs")
    return f"{value:.1%}" if unit == "of a step" else f"{value:.3g} {unit}"


def speed_block() -> str:
    """The results as a Markdown table, and where they were measured below it."""
    files = [RESULTS / f"{name}.json" for name in NAMES]
    results: list[dict[str, Any]] = [json.loads(f.read_text(encoding="utf-8")) for f in files if f.is_file()]
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
