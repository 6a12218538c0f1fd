"""The acceptance gates of a tuned lens: pure functions of its KPIs, and their place in a lens's provenance.

A gate is judged by the figures themselves; their intervals stand beside them. Gate B asks for answers, and for layers:
in a model of four, hardly anything can be four layers earlier.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic_write import write_json
from ..lens_artifact import PROVENANCE_FILE
from .kpis import EARLIER_BY, KPIs

LEAST_DELTA_BITS = (0.2, 0.3, 0.3)
LEAST_SHARE_EARLIER = 0.6
MOST_LAST_LAYER_BITS = 0.05
WORST_DELTA_BITS = -0.1

# gate -> what it asks for
REQUIREMENTS = {
    "A": "median ΔKL at least {:g}, {:g} and {:g} bits at 25, 50 and 75 % depth".format(*LEAST_DELTA_BITS),
    "B": " and ".join(f"rank ≤ {rank} at least {by} layers earlier" for rank, by in EARLIER_BY.items())
    + f", each on at least {LEAST_SHARE_EARLIER:.0%} of the prompts",
    "C": f"the norm lens of the last layer, at its best temperature, within {MOST_LAST_LAYER_BITS:g} bits of the head",
    "D": f"no median ΔKL below {WORST_DELTA_BITS:g} bits",
}


@dataclass(frozen=True)
class Gates:
    """Which acceptance gates a lens passes."""

    gate_a: bool
    gate_b: bool
    gate_c: bool
    gate_d: bool

    @property
    def passed(self) -> bool:
        """Whether all do."""
        return not self.failed()

    def failed(self, required: Collection[str] = tuple(REQUIREMENTS)) -> list[str]:
        """The letters of those that do not pass, of those that are required."""
        return [letter for letter in REQUIREMENTS if letter in required and not self.as_dict()[f"gate_{letter}"]]

    def as_dict(self) -> dict[str, bool]:
        """The verdict of each gate, as the provenance has it."""
        return {"gate_A": self.gate_a, "gate_B": self.gate_b, "gate_C": self.gate_c, "gate_D": self.gate_d}


def judge(kpis: KPIs) -> Gates:
    """Judges a lens by its KPIs."""
    return judge_figures(
        [figure.value for figure in kpis.delta_kl_bits],
        [None if figure is None else figure.value for figure in kpis.earlier_share],
        kpis.last_layer_kl_after_temp_bits.value,
    )


def judge_figures(delta_kl_bits: Sequence[float], earlier_share: Sequence[float | None], last_layer: float) -> Gates:
    """The same by the figures alone, as a provenance has them; see `KPIs`."""
    return Gates(
        gate_a=all(delta >= least for delta, least in zip(delta_kl_bits, LEAST_DELTA_BITS, strict=True)),
        gate_b=all(share is not None and share >= LEAST_SHARE_EARLIER for share in earlier_share),
        gate_c=last_layer <= MOST_LAST_LAYER_BITS,
        gate_d=all(delta >= WORST_DELTA_BITS for delta in delta_kl_bits),
    )


def check_letters(required: Collection[str]) -> None:
    """Checks the letters of gates.

    Raises:
        ValueError: if one names no gate.
    """
    for letter in required:
        if letter not in REQUIREMENTS:
            raise ValueError(f"gates: got {letter!r}; any of {', '.join(REQUIREMENTS)}")


@dataclass(frozen=True)
class Judgement:
    """KPIs and gates of a lens, and what they were judged on."""

    kpis: KPIs
    gates: Gates
    suite: Mapping[str, Any]
    """Its name, the number of its prompts and their hash."""

    def as_dict(self) -> dict[str, Any]:
        """`kpis` and `acceptance`, as the provenance has them."""
        return {"kpis": {**self.kpis.as_dict(), "suite": dict(self.suite)}, "acceptance": self.gates.as_dict()}


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance in a lens's folder.

    Raises:
        ValueError: if there is none that can be read.
    """
    path = folder / PROVENANCE_FILE
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"lens: cannot read {str(path)!r}; pass the folder of a fitted lens") from error
    if not isinstance(provenance, dict):
        raise ValueError(f"lens: {str(path)!r} is no provenance of a lens; pass the folder of a fitted one")
    return provenance


def apply_to_provenance(folder: Path, judgement: Judgement) -> None:
    """Writes KPIs and acceptance into the provenance of a lens's folder, in place of those that are there.

    Raises:
        ValueError: if the folder has no provenance that can be read.
    """
    write_json(folder / PROVENANCE_FILE, read_provenance(folder) | judgement.as_dict())
