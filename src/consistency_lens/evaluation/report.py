"""Tables of metrics and samples, for the terminal and for Markdown; nothing is printed here."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ..explanation import format_top
from .controls import CONTROLS
from .samples import Sample

# metric -> (what people read, decimals)
METRICS = {
    "fve": ("FVE", 3),
    "fve_nrm": ("FVE of directions", 3),
    "cosine": ("cosine", 3),
    "kl": ("KL, nats", 3),
    "kl_recovered": ("KL recovered", 3),
    "top1_agreement": ("top-1 agreement", 3),
    "text_perplexity": ("perplexity of the texts", 2),
    "true_text_perplexity": ("perplexity of true text", 2),
    "perplexity_ratio": ("perplexity ratio", 2),
    "distinct_2": ("distinct bigrams", 3),
}
METRIC_COLUMNS = ("metric", "value", "95% interval")
CONTROL_COLUMNS = ("reconstructed from", "FVE", "KL recovered")
CONTEXT_WIDTH = 36  # characters of a context that a table of 150 columns has room for


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """The metrics with their intervals and, beside them, every control."""
    left = rich_table(METRIC_COLUMNS, metric_rows(metrics))
    right = rich_table(CONTROL_COLUMNS, control_rows(metrics))
    grid = Table.grid(padding=(0, 3))
    grid.title = caption(metrics)
    grid.add_row(left, right)
    return grid


def metrics_markdown(metrics: Mapping[str, Any]) -> str:
    """The same as two Markdown tables."""
    tables = (
        markdown_table(METRIC_COLUMNS, metric_rows(metrics)),
        markdown_table(CONTROL_COLUMNS, control_rows(metrics)),
    )
    return "\n\n".join((*tables, f"{caption(metrics)}.")) + "\n"


def samples_table(samples: Sequence[Sample]) -> Table:
    """One row a sample, for a terminal of 150 columns; contexts are shortened to their end."""
    table = Table(title="Held-out samples: the lens's words for the token between « and »; KL in nats")
    table.add_column("P", justify="right")
    table.add_column("context", max_width=CONTEXT_WIDTH + 1)
    table.add_column("explanation", max_width=CONTEXT_WIDTH)
    for name in ("FVE", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("next before", "next after"):
        table.add_column(name, ratio=1)
    for sample in samples:
        cells = (
            str(sample.position),
            shortened(sample.context, CONTEXT_WIDTH),
            one_line(sample.explanation),
            f"{sample.fve:.2f}",
            f"{sample.kl:.2f}",
            format_top(sample.top_before),
            format_top(sample.top_after),
        )
        # As Text, since a model's words may look like rich's markup.
        table.add_row(*(Text(cell) for cell in cells))
    return table


def caption(metrics: Mapping[str, Any]) -> str:
    rows, documents = metrics["rows"], metrics["documents"]
    return f"{rows:,} held-out rows of {documents:,} documents; intervals by bootstrap over documents"


def metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Label, value and 95% interval of each metric."""
    rows: list[tuple[str, ...]] = []
    for name, (label, decimals) in METRICS.items():
        interval = metrics["ci95"].get(name)
        span = "" if interval is None else " to ".join(f"{end:.{decimals}f}" for end in interval)
        rows.append((label, f"{metrics[name]:.{decimals}f}", span))
    return rows


def control_rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The lens, then its controls: what Â is made from, FVE and KL recovered."""
    compared = {"the lens's text": metrics}
    for name, values in metrics["controls"].items():
        compared[f"{name} ({CONTROLS[name]})" if name in CONTROLS else name] = values
    return [(label, f"{of['fve']:.3f}", f"{of['kl_recovered']:.3f}") for label, of in compared.items()]


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table()
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def one_line(text: str) -> str:
    return text.strip().replace("\n", "⏎")


def shortened(text: str, width: int) -> str:
    """The end of a text, on one line."""
    text = one_line(text)
    return text if len(text) <= width else "…" + text[len(text) - width :]
