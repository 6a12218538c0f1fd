"""The files of a sweep, and all figures of it."""

import io
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..atomic_write import atomic_file, write_text
from ..optional_packages import require
from .heatmap import grid_of, heatmap_figure, heatmap_html, prompt_ids
from .plots import (
    LENSES,
    LensRecords,
    cos_figure,
    delta_kl_figure,
    has_answers,
    kl_figure,
    overview_figure,
    rank_figure,
)
from .readings import NORM, TUNED
from .records import Record, file_names, read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORDS, TUNED_RECORDS = (file_names("", lens)[0] for lens in (NORM, TUNED))  # how their names end
# Drawn twice, a figure has the same bytes: no date, and no random names in SVG.
NO_DATE = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
NAME_LENGTH = 80


class SweepFiles(NamedTuple):
    """What a sweep left of one name."""

    name: str
    norm: Path
    tuned: Path
    """Its records of the tuned lens, which may not be there."""
    run: Path
    """Its run JSON, likewise."""


class Drawn(NamedTuple):
    """What was drawn."""

    files: list[Path]
    notes: list[str]
    """What could not be drawn, and why."""


def find_sweep(records: Path) -> SweepFiles:
    """The files of the sweep in a folder, or with a prefix such as `runs/gpt2` (for `runs/gpt2-records.csv`).

    Raises:
        ValueError: if there is none, or a folder has several.
    """
    if records.is_dir():
        found = sorted(records.glob(f"*{RECORDS}"))
        if len(found) > 1:
            prefixes = ", ".join(str(path).removesuffix(RECORDS) for path in found)
            raise ValueError(f"records: {str(records)!r} has several sweeps; pass one of {prefixes}")
    else:
        found = [path for path in (Path(f"{records}{RECORDS}"),) if path.is_file()]
    if not found:
        raise ValueError(
            f"records: no *{RECORDS} at {str(records)!r}; pass the folder or the prefix that tuned-lens sweep wrote"
        )
    prefix = str(found[0]).removesuffix(RECORDS)
    return SweepFiles(Path(prefix).name, found[0], Path(prefix + TUNED_RECORDS), Path(prefix + ".json"))


def read_sweep(sweep: SweepFiles) -> dict[str, list[Record]]:
    """The records of each lens that was swept.

    Raises:
        ValueError: if the norm lens has none, or a lens is unknown.
    """
    lenses = defaultdict(list)
    for path in (sweep.norm, sweep.tuned):
        for record in read_records(path) if path.is_file() else []:
            lenses[record.lens].append(record)
    unknown = next((name for name in lenses if name not in LENSES), None)
    if unknown is not None:
        raise ValueError(f"records: the column 'lens' says {unknown!r}, known are {', '.join(LENSES)}; sweep again")
    if NORM not in lenses:
        raise ValueError(f"records: {str(sweep.norm)!r} has no rows of the norm lens; sweep again")
    return {name: lenses[name] for name in LENSES if name in lenses}


def draw_sweep(sweep: SweepFiles, folder: Path, format: str = "png", prompt_id: str | None = None) -> Drawn:
    """Draws all figures of a sweep, and the heatmap of one prompt as a figure and as a page.

    Args:
        prompt_id: default: the first prompt.

    Raises:
        ValueError: if matplotlib is not installed, there is no such prompt, or see `read_sweep`.
    """
    require("matplotlib", extra="plots", needed_for="tuned-lens plot")
    records = read_sweep(sweep)
    prompt_id = prompt_ids(records[NORM])[0] if prompt_id is None else prompt_id
    grid_of(records[NORM], prompt_id)  # an unknown prompt is told before anything is written
    run = read_run(sweep)
    title = run.get("model_id") or sweep.name
    figures, notes = possible_figures(records, sweep, calibrated_kl(run))
    files = []
    for name, draw in figures.items():
        files.append(write_figure(folder / f"{sweep.name}-{name}.{format}", draw(records, title)))
    heatmap = f"{sweep.name}-heatmap-{file_name(prompt_id)}"
    figure = heatmap_figure(records, prompt_id, title=f"{title}, prompt {prompt_id}")
    files.append(write_figure(folder / f"{heatmap}.{format}", figure))
    files.append(folder / f"{heatmap}.html")
    write_text(files[-1], heatmap_html(records, prompt_id, title))
    return Drawn(files, notes)


def possible_figures(
    records: LensRecords, sweep: SweepFiles, calibrated: Sequence[float] | None = None
) -> tuple[dict[str, Callable[[LensRecords, str], "Figure"]], list[str]]:
    """The figures that these records can give, by the end of their file names; and notes on the others."""
    figures: dict[str, Callable[[LensRecords, str], Figure]] = {
        "kl": partial(kl_figure, calibrated=calibrated),
        "cos": cos_figure,
        "overview": partial(overview_figure, calibrated=calibrated),
    }
    notes = []
    if has_answers(records):
        figures["rank"] = rank_figure
    else:
        notes.append("No prompt has an answer: there is no figure of its rank")
    if TUNED in records:
        figures["delta-kl"] = delta_kl_figure
    else:
        notes.append(f"No records of a tuned lens at {sweep.tuned}: the norm lens alone is drawn")
    return figures, notes


def read_run(sweep: SweepFiles) -> dict[str, Any]:
    """The run JSON; empty where there is none, for the records can be drawn without it."""
    return json.loads(sweep.run.read_text(encoding="utf-8")) if sweep.run.is_file() else {}


def calibrated_kl(run: Mapping[str, Any]) -> list[float] | None:
    """Median KL in bits at each layer of the norm lens with fitted temperatures; None where a run has none, as they
    are fitted with a tuned lens."""
    found = [layer["calibrated_norm"]["kl_from_final_bits"] for layer in run.get("layers", ())]
    return None if not found or None in found else found


def write_figure(path: Path, figure: "Figure") -> Path:
    """Writes a figure in the format that its path ends in, whole or not at all."""
    import matplotlib

    image = io.BytesIO()
    format = path.suffix[1:]
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "consistency-lens"}):
        # each character that no installed font has is a box in the figure, and would be a line here
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(image, format=format, metadata=NO_DATE[format])
    with atomic_file(path) as file:
        file.write(image.getvalue())
    return path


def file_name(prompt_id: str) -> str:
    """A prompt's id as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", prompt_id)[:NAME_LENGTH]
