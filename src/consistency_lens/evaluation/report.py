"""Tables of metrics and samples, for the terminal and for Markdown; nothing is printed here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.columns import Columns
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..explanation import format_top, one_line
from .controls import CONTROLS
from .samples import Sample
from .text_length import PARTS

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
    "true_distinct_2": ("distinct in true text", 3),
    "unused_token_share": ("tokens unused", 3),
    "true_unused_token_share": ("unused in true text", 3),
}
METRIC_COLUMNS = ("metric", "value", "95% interval")
CONTROL_COLUMNS = ("reconstructed from", "FVE", "KL recovered")
# names in `metrics.json` -> what people read
READERS = {
    "retokenised": "the lens's text tokenised anew, its own encoder",
    "word_shuffle": "its words in another order, its own encoder",
    "fresh_encoder": "the lens's text, an encoder that has read true text alone",
    "fresh_encoder_on_true_text": "the true end of the context, that encoder",
}
STEPS = {
    "random_token": "the last token exchanged for a random one",
    "random_direction": "a random direction of that length",
}
SAMPLE_COLUMNS = ("P", "context", "continuation", "explanation", "FVE", "KL", "next before", "next after")
WORDS_SHOWN = 3
CONTEXT_WIDTH = 36  # characters of a context that a table of 150 columns has room for
SAMPLES_TITLE = "Held-out samples: the lens's words for the token between « and »; KL in nats"


class CheckTable(NamedTuple):
    """What one check of an evaluation found, for people."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def metrics_table(metrics: Mapping[str, Any]) -> Group:
    """The metrics with their intervals and, beside them, every control; below them the checks that were run."""
    left = rich_table(METRIC_COLUMNS, metric_rows(metrics))
    right = rich_table(CONTROL_COLUMNS, control_rows(metrics))
    # side by side where there is room
    parts: list[Any] = [Columns([left, right], padding=(0, 3)), caption(metrics)]
    for check in check_tables(metrics):
        parts += [f"\n{check.title}:", rich_table(check.columns, check.rows)]
    return Group(*parts)


def metrics_markdown(metrics: Mapping[str, Any]) -> str:
    """The same as Markdown tables."""
    parts = [
        markdown_table(METRIC_COLUMNS, metric_rows(metrics)),
        markdown_table(CONTROL_COLUMNS, control_rows(metrics)),
        f"{caption(metrics)}.",
        check_markdown(metrics),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def check_markdown(metrics: Mapping[str, Any]) -> str:
    """The checks that were run, each a table below its title."""
    tables = check_tables(metrics)
    return "\n\n".join(f"{table.title}:\n\n{markdown_table(table.columns, table.rows)}" for table in tables)


def samples_table(samples: Sequence[Sample], title: str = SAMPLES_TITLE) -> Table:
    """One row a sample, for a terminal of 150 columns; contexts are shortened to their end."""
    table = Table(title=title)
    table.add_column("P", justify="right")
    table.add_column("context → how the subject goes on", max_width=CONTEXT_WIDTH + 1)
    table.add_column("explanation", max_width=CONTEXT_WIDTH)
    for name in ("FVE", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("next before", "next after"):
        table.add_column(name, ratio=1)
    for sample in samples:
        cells = (
            str(sample.position),
            f"{shortened(sample.context, CONTEXT_WIDTH)}\n→ {one_line(sample.continuation)}",
            one_line(sample.explanation),
            f"{sample.fve:.2f}",
            f"{sample.kl:.2f}",
            format_top(sample.top_before),
            format_top(sample.top_after),
        )
        # As Text, since a model's words may look like rich's markup.
        table.add_row(*(Text(cell) for cell in cells))
    return table


def samples_markdown(samples: Sequence[Sample]) -> str:
    """One row a sample, whole contexts."""
    rows = [
        [f"{value:.2f}" if isinstance(value, float) else str(value) for value in sample_values(sample)]
        for sample in samples
    ]
    return markdown_table(SAMPLE_COLUMNS, rows, numbers=False) + "\n"


def sample_values(sample: Sample) -> list[int | float | str]:
    """A sample's `SAMPLE_COLUMNS`, numbers as numbers."""
    texts = [sample.context, sample.continuation, sample.explanation]
    tops = [format_top(sample.top_before), format_top(sample.top_after)]
    return [sample.position, *texts, sample.fve, sample.kl, *tops]


def caption(metrics: Mapping[str, Any]) -> str:
    rows, documents = metrics["rows"], metrics["documents"]
    return f"{rows:,} held-out rows of {documents:,} documents; intervals by bootstrap over documents"


def metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Label, value and 95% interval of each metric that was measured."""
    rows: list[tuple[str, ...]] = []
    measured = {name: shown for name, shown in METRICS.items() if name in metrics}
    for name, (label, decimals) in measured.items():
        interval = metrics["ci95"].get(name)
        span = "" if interval is None else " to ".join(f"{end:.{decimals}f}" for end in interval)
        rows.append((label, f"{metrics[name]:.{decimals}f}", span))
    return rows


def control_rows(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The lens, then its controls: what Â is made from, FVE and KL recovered."""
    compared = {"the lens's text": metrics}
    compared |= {control_label(name, values): values for name, values in metrics["controls"].items()}
    return [(label, f"{of['fve']:.3f}", f"{of['kl_recovered']:.3f}") for label, of in compared.items()]


def control_label(name: str, values: Mapping[str, Any]) -> str:
    """A control's name with what it reconstructs from."""
    meaning = CONTROLS.get(name, "")
    if "bits" in values:
        meaning += f", {values['bits']:.0f} bits"
    return f"{name} ({meaning})" if meaning else name


def check_tables(metrics: Mapping[str, Any]) -> list[CheckTable]:
    """The tables of those checks that were run, as `metrics.json` has them."""
    return [table(metrics) for name, table in CHECK_TABLES.items() if name in metrics]


def best_of_n_table(metrics: Mapping[str, Any]) -> CheckTable:
    rows = [(count, *numbers(of, "fve", "kl_recovered")) for count, of in metrics["best_of_n"].items()]
    return CheckTable("The best of n sampled texts, picked by their squared error", ("n", "FVE", "KL recovered"), rows)


def text_length_table(metrics: Mapping[str, Any]) -> CheckTable:
    length = metrics["text_length"]
    columns = [(part, of) for part in PARTS for of in ("fve", "kl_recovered")]
    rows = [
        (f"{tokens}", *(f"{length[part][of][place]:.3f}" for part, of in columns))
        for place, tokens in enumerate(length["tokens"])
    ]
    return CheckTable(
        "FVE and KL recovered where the encoder reads only so many tokens of the lens's text, or of the true context",
        ("tokens", "first: FVE", "KL rec.", "last: FVE", "KL rec.", "true last: FVE", "KL rec."),
        rows,
    )


def private_code_table(metrics: Mapping[str, Any]) -> CheckTable:
    code = metrics["private_code"]
    rows = [
        ("the lens's text, its own encoder", *numbers(metrics, "fve", "kl_recovered"), "1.000"),
        *(
            (label, *numbers(code[name], "fve", "kl_recovered", "share_of_fve"))
            for name, label in READERS.items()
            if name in code
        ),
    ]
    return CheckTable(
        "Whether the words say the same to another reader", ("reader", "FVE", "KL recovered", "share of the FVE"), rows
    )


def linear_probe_table(metrics: Mapping[str, Any]) -> CheckTable:
    probe = metrics["linear_probe"]
    names = ("probe_accuracy", "named_by_text", "named_by_shuffled_text")
    rows = [
        ("P" if offset == 0 else f"P - {offset}", *(f"{share:.3f}" for share in shares), f"{count:,}")
        for offset, (*shares, count) in enumerate(zip(*(probe[name] for name in (*names, "rows")), strict=True))
    ]
    columns = ("token at", "linear probe", "the lens's text", "another row's text", "rows")
    return CheckTable("How often a linear probe of A, and the text, name a token of the context", columns, rows)


def ablation_table(metrics: Mapping[str, Any]) -> CheckTable:
    words, sentences = metrics["ablation"]["words"], metrics["ablation"]["sentences"]
    labels = ["the last word", *(f"the word {n} before the last" for n in range(1, len(words["drop_from_end"])))]
    from_end = zip(labels, words["drop_from_end"], words["count_from_end"], strict=False)
    greatest = ((f"“{of['word']}”", of["mean_drop"], of["count"]) for of in words["greatest"][:WORDS_SHOWN])
    rows = [
        ("a word", *means(words, "mean_drop", "mean_kl_increase"), f"{words['count']:,}"),
        ("the word of a text that counts most", *means(words, "mean_top_drop"), "", ""),
        *((label, f"{drop:.3f}", "", f"{count:,}") for label, drop, count in (*from_end, *greatest)),
        ("a sentence", *means(sentences, "mean_drop", "mean_kl_increase"), f"{sentences['count']:,}"),
    ]
    columns = ("left out", "FVE lost", "KL gained, nats", "times")
    return CheckTable("What the reconstruction loses without parts of the text", columns, rows)


def steering_table(metrics: Mapping[str, Any]) -> CheckTable:
    steps = {"the last token exchanged for a donor's": metrics["steering"]}
    steps |= {STEPS.get(name, name): of for name, of in metrics["steering"]["controls"].items()}
    names = ("target_logprob_change", "own_top_logprob_change", "target_rises")
    return CheckTable(
        "What an edit of the words does to the subject's prediction (mean change of log p in nats)",
        ("step along", "donor's next token", "own next token", "donor's rises"),
        [(label, *numbers(of, *names)) for label, of in steps.items()],
    )


def numbers(of: Mapping[str, float], *names: str) -> tuple[str, ...]:
    return tuple(f"{of[name]:.3f}" for name in names)


def means(of: Mapping[str, float], *names: str) -> tuple[str, ...]:
    """Blank where they are means over nothing."""
    return numbers(of, *names) if of["count"] else ("",) * len(names)


# name of a check in `metrics.json` -> its table
CHECK_TABLES: dict[str, Callable[[Mapping[str, Any]], CheckTable]] = {
    "best_of_n": best_of_n_table,
    "text_length": text_length_table,
    "private_code": private_code_table,
    "linear_probe": linear_probe_table,
    "ablation": ablation_table,
    "steering": steering_table,
}


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table()
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        # As Text, since a model's words may look like rich's markup.
        table.add_row(*(Text(cell) for cell in row))
    return table


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A Markdown table whose first column is text, as are the others without `numbers`."""
    rule = ["---", *("---:" if numbers else "---" for _ in columns[1:])]
    escaped = ([cell.replace("|", "\\|").replace("\n", "⏎") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *escaped))


def shortened(text: str, width: int) -> str:
    """The end of a text, on one line."""
    text = one_line(text)
    return text if len(text) <= width else "…" + text[len(text) - width :]
