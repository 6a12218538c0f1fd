"""What a training cost in energy and CO2, from the file that codecarbon leaves (`--report_to codecarbon`)."""

import csv
import math
from pathlib import Path
from typing import NamedTuple

EMISSIONS_FILE = "emissions.csv"


class Emissions(NamedTuple):
    """The sum over the runs that a folder's file has; a run that goes on after a stop is one more."""

    kg: float
    """Of CO2 equivalents."""
    kwh: float | None
    runs: int
    country: str | None
    hardware: str | None


def read_emissions(folder: Path) -> Emissions | None:
    """What `emissions.csv` of a folder says; None where there is none, or no run in it was measured to its end."""
    file = folder / EMISSIONS_FILE
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", newline="") as lines:
        # a run may have several rows, each with what it came to by then
        last = {row.get("run_id") or str(number): row for number, row in enumerate(csv.DictReader(lines))}
    rows = [row for row in last.values() if _number(row, "emissions") is not None]
    if not rows:
        return None
    energies = [_number(row, "energy_consumed") for row in rows]
    return Emissions(
        kg=sum(_number(row, "emissions") or 0.0 for row in rows),
        kwh=None if None in energies else sum(energy or 0.0 for energy in energies),
        runs=len(rows),
        country=rows[-1].get("country_name") or None,
        hardware=rows[-1].get("gpu_model") or rows[-1].get("cpu_model") or None,
    )


def _number(row: dict[str, str], name: str) -> float | None:
    try:
        value = float(row.get(name) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
