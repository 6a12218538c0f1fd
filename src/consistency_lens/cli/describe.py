"""`consistency-lens describe`: what an activation cache holds, as tables and figures in the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

BAR_WIDTH = 60
EIGHTHS = " ▏▎▍▌▋▊▉"
NO_TOKENIZER = " (no tokenizer is to be had; pass one with --tokenizer)"
UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass
class DescribeArguments:
    """Which cache is described, and what is shown of it."""

    cache: str = field(
        default="", metadata={"help": "Folder of a cache, or a folder that has caches below it: a table of all."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Decodes the tokens: Hub id or folder; default: the one the cache names."}
    )
    top_tokens: int = field(default=15, metadata={"help": "How many of the most frequent tokens are listed."})
    json: bool = field(default=False, metadata={"help": "JSON in place of tables."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        if not self.cache:
            raise ValueError("cache: got none; pass it, e.g. --cache data/activations")
        if self.top_tokens < 1:
            raise ValueError(f"top_tokens must be at least 1, got {self.top_tokens}")


def main(argv: Sequence[str] | None = None) -> int:
    """Describes a cache, or lists the caches below a folder. Returns the exit code."""
    from .command import run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        (args,) = parse_arguments((DescribeArguments,), argv, "describe")
        figures, shown = describe(args)
        if args.json:
            import json

            print(json.dumps(figures, indent=2))
        else:
            console.print(shown)

    return run_command(work)


def describe(args: DescribeArguments) -> "tuple[Mapping[str, Any] | list[Any], Group | Table]":
    """The figures of a cache, or of each of several, and how they are shown.

    Raises:
        ValueError: if there is no cache, or the tokenizer that is asked for does not do.
    """
    from ..data.activation_cache import ActivationCache
    from ..data.cache_description import describe_cache, load_cache_tokenizer
    from ..data.cache_verification import find_caches, is_cache

    paths = find_caches(args.cache)
    if paths == [Path(args.cache)]:
        cache = ActivationCache.open(paths[0])
        tokenizer = load_cache_tokenizer(cache.provenance, args.tokenizer)
        figures = describe_cache(cache, tokenizer, args.top_tokens, progress=not args.disable_tqdm)
        return figures, description(figures)
    finished = [ActivationCache.open(path) for path in paths if is_cache(path)]
    listed = [summary(cache.path, cache.provenance) for cache in finished]
    unfinished = [path for path in paths if not is_cache(path)]
    return listed, summary_table(Path(args.cache), listed, unfinished)


def summary(path: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a table of several caches says of one, from its provenance alone."""
    size = sum(shard["bytes"] for shard in provenance["shards"])
    names = ("subject", "layer", "width", "dtype", "dataset", "dataset_split", "rows", "rms")
    return {"path": str(path), **{name: provenance[name] for name in names}, "bytes": size}


def summary_table(root: Path, listed: Sequence[Mapping[str, Any]], unfinished: Sequence[Path]) -> "Table":
    """One row a cache."""
    from rich.table import Table
    from rich.text import Text

    from ..data.cache_folder import how_to_finish

    table = Table()
    table.add_column("cache", overflow="fold")
    for name in ("layer", "split", "rows", "width", "stored as", "rms", "disk"):
        table.add_column(name, justify="right", no_wrap=True)
    for of in listed:
        cells = (
            str(Path(of["path"]).relative_to(root)), str(of["layer"]), of["dataset_split"] or "", f"{of['rows']:,}",
            f"{of['width']:,}", of["dtype"], f"{of['rms']:.4g}", readable_size(of["bytes"]),
        )  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells))
    for path in unfinished:
        table.add_row(Text(f"{path.relative_to(root)} (unfinished: {how_to_finish(path)})"))
    return table


def description(figures: Mapping[str, Any]) -> "Group":
    """A cache in full: facts, quantiles, the histogram of norms, outliers and tokens."""
    from rich.console import Group

    from ..evaluation.report import rich_table

    quantiles = [("norm", *(f"{value:.4g}" for value in figures["norm"].values()))]
    position = figures["position"]
    positions = [("position P", *(f"{position.get(name, ''):,}" for name in position))]
    decoded = any(of["text"] is not None for of in figures["tokens"])
    parts: list[Any] = [
        facts_table(figures),
        rich_table(("", *position), positions),
        rich_table(("", *figures["norm"]), quantiles),
        histogram_text(figures["norm_histogram"], figures["outliers"]["threshold"]),
        *outlier_parts(figures["outliers"]),
        f"\nThe most frequent tokens at P{'' if decoded else NO_TOKENIZER}:",
        token_table(figures["tokens"]),
    ]
    return Group(*parts)


def facts_table(figures: Mapping[str, Any]) -> "Table":
    """Label and value of what holds for the whole cache."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    for label, value in facts(figures):
        table.add_row(Text(label), Text(value))
    return table


def facts(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and value of each."""
    from ..data.cache_description import corpus_facts

    sequences, positions, disk = figures["sequences"], figures["positions"], figures["disk"]
    shards = f"{disk['shards']:,} {'shard' if disk['shards'] == 1 else 'shards'}"
    loaded, tokens = figures.get("loaded_as", {}), figures["context_tokens"]
    found = [
        ("cache", figures["path"]),
        ("subject", at_revision(figures["subject"], figures.get("subject_revision"))),
        ("loaded in", f"{loaded.get('dtype', 'unknown')}{', quantised' if loaded.get('quantization') else ''}"),
        ("tokenizer", figures.get("tokenizer", "unknown")),
        ("layer", f"{figures['layer']}, the output of block {figures['layer']}, {figures['width']:,} dimensions"),
        ("data set", at_revision(figures["dataset"], figures.get("dataset_revision"))),
        ("split of the cache", figures.get("dataset_split", "not said")),
        *corpus_facts(figures),
        ("rows", f"{figures['rows']:,} of {figures['documents']:,} documents"),
        ("sequences", f"{sequences['kept']:,} kept, {sequences['skipped_too_short']:,} skipped as too short"),
        ("tokens in contexts", f"{tokens:,}, {tokens / figures['rows']:.1f} a row"),
        ("positions", f"{positions['rule']}; {positions['per_sequence']} a sequence, "
                      f"min_position {positions['min_position']}, seed {figures['seed']}"),
        ("norm filter", norm_filter(figures)),
        ("stored as", f"{figures['dtype']}, rms about the mean {figures['rms']:.4g} per dimension"),
        ("disk", f"{readable_size(disk['bytes'])} in {shards}, {disk['bytes_per_row']:,.0f} a row"),
    ]  # fmt: skip
    pulled = figures.get("pulled_from")
    return found + ([("pulled from", f"{pulled['repo']} at {pulled['commit']}")] if pulled else [])


def at_revision(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name} at {revision}"


def norm_filter(figures: Mapping[str, Any]) -> str:
    if "norm_filter" not in figures:
        return "none"
    found = figures["norm_filter"]
    return (
        f"rows above {found['largest_norm']:.4g} dropped ({figures['max_norm']:g} times the median "
        f"{found['median_norm']:.4g}): {found['dropped_rows']:,}"
    )


def histogram_text(histogram: Mapping[str, Any], threshold: float) -> "Text":
    """The rows by norm, a bar each; bins beyond the threshold and the one that it lies in are marked, and no bin with
    a row looks empty."""
    from rich.text import Text

    edges, counts = histogram["edges"], histogram["rows"]
    most, width = max(counts), max(len(f"{count:,}") for count in counts)
    scale = ", edges in equal ratios" if histogram["log_spaced"] else ""
    text = Text(f"\nRows by norm{scale}:\n")
    told = [f"{edge:.4g}" for edge in edges]
    edge_width = max(map(len, told))
    for index, count in enumerate(counts):
        low, high = edges[index], edges[index + 1]
        mark, style = "", "cyan"
        if count and low >= threshold:
            mark, style = "  beyond 10 x the median", "red"
        elif count and high > threshold:
            mark, style = f"  10 x the median is {threshold:.4g}", "yellow"
        text.append(f"{told[index]:>{edge_width}} – {told[index + 1]:>{edge_width}} {count:>{width},} ")
        text.append(bar(count, most), style=style)
        text.append(f"{mark}\n")
    return text


def bar(count: int, most: int) -> str:
    """A bar in eighths of a character, at least one for a count above 0."""
    eighths = max(round(count / most * BAR_WIDTH * 8), 1 if count else 0)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def outlier_parts(outliers: Mapping[str, Any]) -> list[Any]:
    """How many rows are massive activations, at which tokens and positions."""
    head = f"{outliers['rows']:,} rows beyond ten times the median norm ({outliers['threshold']:.4g})"
    if not outliers["rows"]:
        return [f"{head}."]
    places = ", ".join(f"{of['position']} ({of['rows']:,})" for of in outliers["positions"][:8])
    return [f"{head}, at positions (rows) {places}; their tokens:", token_table(outliers["tokens"])]


def token_table(tokens: Sequence[Mapping[str, Any]]) -> "Table":
    """One row a token; without a tokenizer the ids stand alone."""
    from ..evaluation.report import rich_table

    rows = [
        (
            "" if of["text"] is None else repr(of["text"]),
            str(of["id"]), f"{of['rows']:,}", f"{of['share']:.2%}", f"{of['mean_norm']:.4g}",
        )
        for of in tokens
    ]  # fmt: skip
    decoded = any(of["text"] is not None for of in tokens)
    columns = ("token", "id", "rows", "share", "mean norm")
    return rich_table(columns, rows) if decoded else rich_table(columns[1:], [row[1:] for row in rows])


def readable_size(size: float) -> str:
    """Bytes in the unit that gives a short number."""
    for unit in UNITS:
        if size < 1000 or unit == UNITS[-1]:
            break
        size /= 1000
    return f"{size:,.4g} {unit}"
