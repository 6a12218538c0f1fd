"""Plots of what a run has left in its folder: curves, controls, FVE against T. Their data are those of its report."""

from collections.abc import Sequence
from pathlib import Path

from ..report.curves import curves
from ..report.document import title_of
from ..report.explorer_file import EXPLORER_FILE, read_explorer
from ..report.figures import Compared, best_of_n, comparison, text_length
from ..report.profiles import Group, profiles
from ..report.run_folder import RunFolder, read_run
from .chart import MIDDOT, AnyFigure, Chart, Dot, Dots, Line, Lines, Mark
from .drawing import drawn

FVE, KL_RECOVERED = "FVE", "KL recovered"
SCALE = "1 is perfect, 0 the mean activation"
INTERVALS = "95% intervals by bootstrap over documents"
LOWEST = -1.0  # of a share; what lies below is named at the edge
ROOM = 0.06  # of a share, at either end of its axis
# Controls that are a question of length too.
OF_LENGTH = {"context_tail": "true end of the context", "residual_vq": "the same bits, not as language"}


def training_curves(run: str | Path, only: Sequence[str] | None = None, interactive: bool = False) -> AnyFigure:
    """The log of a training over its steps, with its stages marked: held-out FVE and KL recovered where they were
    measured on the way (`--eval_strategy steps`), and every loss.

    Args:
        run: folder of a training.
        only: titles of the panels to draw, such as `held-out rows` or `KL`; None for all.
        interactive: a plotly figure in place of one of matplotlib.

    Raises:
        ValueError: if there is no such run, its log has no such curve, or the library is not installed.
    """
    read = read_run(run)
    found = curves(read)
    if found is None:
        raise ValueError(f"training_curves: no curves in {str(run)!r}; pass the output_dir of a training")
    titles = [of["title"] for of in found["charts"]]
    missing = [title for title in only or () if title not in titles]
    if missing:
        raise ValueError(f"training_curves: only: the log has nothing for {missing[0]!r}; it has {', '.join(titles)}")
    marks = [Mark(stage["label"], stage["start"]) for stage in found["stages"]]
    last = max(line["points"][-1][0] for of in found["charts"] for line in of["lines"])
    panels = [
        Lines(
            title=capital(of["title"]),
            x_label="step",
            y_label=of["unit"],
            lines=[line_of(line["label"], line["points"]) for line in of["lines"]],
            marks=marks,
            markers=False,
            x_domain=(0, last),
        )
        for of in found["charts"]
        if only is None or of["title"] in only
    ]
    return drawn(Chart(f"Training of {title_of(read)}", panels), interactive)


def capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def line_of(label: str, points: Sequence[Sequence[float]]) -> Line:
    """A line through [x, y]."""
    x, y = zip(*points, strict=True)
    return Line(label, x, y)


def controls(run: str | Path, interactive: bool = False) -> AnyFigure:
    """What is rebuilt from the lens's text beside what is rebuilt from its controls: FVE and KL recovered, with 95%
    intervals.

    Args:
        run: folder of a training or an evaluation.
        interactive: a plotly figure in place of one of matplotlib.

    Raises:
        ValueError: if there is no such run, it was not evaluated, or the library is not installed.
    """
    read = evaluated(run, "controls")
    rows = sorted(comparison(read.metrics), key=lambda of: of["fve"], reverse=True)
    shares = [
        dots(FVE, rows, [of["fve"] for of in rows], [of["interval"] for of in rows]),
        dots(KL_RECOVERED, rows, [of["kl_recovered"] for of in rows], [of["kl_interval"] for of in rows]),
    ]
    return drawn(Chart(title_of(read), shares, f"bars: {INTERVALS}{MIDDOT}{rows_of(read)}"), interactive)


def dots(
    title: str, compared: Sequence[Compared], values: Sequence[float | None], intervals: Sequence[list[float] | None]
) -> Dots:
    """One row for each that has a value."""
    rows = [
        Dot(of["label"], value, interval, strong=of["name"] == "lens")
        for of, value, interval in zip(compared, values, intervals, strict=True)
        if value is not None
    ]
    lowest = max(LOWEST, min([0.0, *(row.value for row in rows)]) - ROOM)
    highest = max([1.0, *(row.value for row in rows)]) + ROOM
    return Dots(title, SCALE, rows, (lowest, highest), zero=True)


def fve_against_tokens(*runs: str | Path, interactive: bool = False) -> AnyFigure:
    """FVE and KL recovered against the number of text tokens, with 95% intervals.

    Of one run: where its encoder reads only the first or the last t of the T tokens, beside as many of the context
    (the check `text_length` of an evaluation). Of several runs: each with its own T, beside their controls.

    Args:
        *runs: folders of trainings or evaluations.
        interactive: a plotly figure in place of one of matplotlib.

    Raises:
        ValueError: if there is no such run, it was not evaluated with that check, or the library is not installed.
    """
    if not runs:
        raise ValueError("fve_against_tokens: got no run; pass the folder of one, or of several with another T each")
    read = [evaluated(run, "fve_against_tokens") for run in runs]
    return drawn(chart_of_parts(read[0]) if len(read) == 1 else chart_of_runs(read), interactive)


def chart_of_parts(run: RunFolder) -> Chart:
    """One run, its text read in part."""
    parts = text_length(run.metrics)
    if not parts:
        raise ValueError(
            f"fve_against_tokens: {str(run.path)!r} was evaluated without the check text_length; run consistency-lens "
            "eval --checks text_length, and pass the folder that it writes to"
        )
    current = next((of for of in comparison(run.metrics) if of["name"] == "current_token_only"), None)
    panels = []
    for title, values, intervals in ((FVE, "fve", "intervals"), (KL_RECOVERED, "kl_recovered", "kl_intervals")):
        lines = [Line(of["label"], of["tokens"], of[values], of[intervals]) for of in parts]  # type: ignore[literal-required]
        levels = [] if current is None else [("current token alone", current[values])]  # type: ignore[literal-required]
        panels.append(against_tokens(title, "tokens that the encoder reads", lines, levels))
    return Chart(title_of(run), panels, f"bands: {INTERVALS}{MIDDOT}{rows_of(run)}")


def chart_of_runs(runs: Sequence[RunFolder]) -> Chart:
    """Several runs in the order of their T."""
    by_length = sorted(((length_of(run), comparison(run.metrics)) for run in runs), key=lambda of: of[0])
    panels = []
    for title, value, interval in ((FVE, "fve", "interval"), (KL_RECOVERED, "kl_recovered", "kl_interval")):
        lines = []
        for name, label in {"lens": "lens's text", **OF_LENGTH}.items():
            points = [
                (tokens, of[value], of[interval])  # type: ignore[literal-required]
                for tokens, compared in by_length
                for of in compared
                if of["name"] == name and of[value] is not None  # type: ignore[literal-required]
            ]
            if points:
                x, y, bands = zip(*points, strict=True)
                lines.append(Line(label, x, y, None if None in bands else bands))
        panels.append(against_tokens(title, "text tokens T", lines))
    subject = " and ".join(dict.fromkeys(title_of(run) for run in runs))
    return Chart(subject, panels, f"one lens for each T{MIDDOT}bands: {INTERVALS}")


def against_tokens(title: str, x_label: str, lines: Sequence[Line], levels: Sequence[tuple[str, float]] = ()) -> Lines:
    """Axes of a share over lengths; lengths that grow as powers of two do stand on a logarithmic axis."""
    ticks = sorted({x for line in lines for x in line.x})
    scale = "log" if ticks[-1] >= 16 * ticks[0] else "linear"
    return Lines(f"{title} ({SCALE})", x_label, title, lines, x_scale=scale, ticks=ticks, levels=levels)


def best_of_n_texts(run: str | Path, interactive: bool = False) -> AnyFigure:
    """FVE and KL recovered of the best of n sampled texts against n (the check `best_of_n` of an evaluation).

    Args:
        run: folder of a training or an evaluation.
        interactive: a plotly figure in place of one of matplotlib.

    Raises:
        ValueError: if there is no such run, it was not evaluated with that check, or the library is not installed.
    """
    read = evaluated(run, "best_of_n_texts")
    rows = best_of_n(read.metrics)
    if not rows:
        raise ValueError(
            f"best_of_n_texts: {str(run)!r} was evaluated without the check best_of_n; run consistency-lens eval "
            "--checks best_of_n, and pass the folder that it writes to"
        )
    counts = [of["n"] for of in rows]
    lines = [
        Line(FVE, counts, [of["fve"] for of in rows]),
        Line(KL_RECOVERED, counts, [of["kl_recovered"] for of in rows]),
    ]
    title = "The best of n sampled texts, picked by its squared error"
    panel = Lines(title, "n, texts", f"share: {SCALE}", lines, x_scale="log", ticks=counts)
    return drawn(Chart(title_of(read), [panel], rows_of(read)), interactive)


def token_profiles(run: str | Path, interactive: bool = False) -> AnyFigure:
    """FVE, KL and norm of the activation by position in the text and by kind of token, with 95% intervals; of the
    texts that the run's report has read (`explorer.json`).

    Args:
        run: folder of a training, after `consistency-lens report`.
        interactive: a plotly figure in place of one of matplotlib.

    Raises:
        ValueError: if there is no such run or no report of it, or the library is not installed.
    """
    read = read_run(run)
    if not (read.path / EXPLORER_FILE).is_file():
        raise ValueError(f"token_profiles: no {EXPLORER_FILE} in {str(run)!r}; run consistency-lens report with it")
    explorer = read_explorer(read.path / EXPLORER_FILE)
    found = profiles(explorer)
    quantities = {
        "fve": ("FVE", SCALE, 2),
        "kl": ("KL", "nats", 2),
        "norm": ("Norm of A", "mean |A|", 1),
    }
    panels = [
        Dots(
            f"{title} by {by}",
            unit,
            [profile_row(group, name) for group in groups],
            decimals=decimals,
            zero=name != "norm",
        )
        for by, groups in (("position", found["position"]), ("kind of token", found["token_class"]))
        if groups
        for name, (title, unit, decimals) in quantities.items()
    ]
    tokens = sum(len(text["tokens"]) for text in explorer["texts"])
    note = f"{tokens:,} tokens of {len(explorer['texts'])} texts{MIDDOT}95% intervals by bootstrap over texts"
    return drawn(Chart(title_of(read), panels, note, columns=len(quantities)), interactive)


def profile_row(group: Group, name: str) -> Dot:
    value, *interval = group["values"][name]
    return Dot(group["label"], value, interval or None, strong=True)


def evaluated(run: str | Path, plot: str) -> RunFolder:
    """The run in a folder.

    Raises:
        ValueError: if there is none, or it was not evaluated.
    """
    read = read_run(run)
    if not comparison(read.metrics):
        raise ValueError(f"{plot}: no figures in {str(run)!r}; run consistency-lens eval --lens with this folder")
    return read


def length_of(run: RunFolder) -> int:
    """T.

    Raises:
        ValueError: if the run does not say it.
    """
    length = run.recipe.get("num_text_tokens")
    if not isinstance(length, int):
        raise ValueError(f"fve_against_tokens: {str(run.path)!r} does not say its num_text_tokens; leave it out")
    return length


def rows_of(run: RunFolder) -> str:
    return f"{run.metrics['rows']:,} held-out rows of {run.metrics['documents']:,} documents"
