"""Explorers and reports that are made up, for tests of the page that shows them."""

from typing import Any

import numpy as np

from consistency_lens.report.document import FORMAT, VERSION, ReportDocument
from consistency_lens.report.explorer import FORMAT as EXPLORER_FORMAT
from consistency_lens.report.explorer import VERSION as EXPLORER_VERSION
from consistency_lens.report.explorer import Explorer, ExplorerText
from consistency_lens.report.profiles import profiles

WORDS = [
    "Once",
    " upon",
    " a",
    " time",
    ",",
    " there",
    " was",
    " little",
    " dog",
    ".",
    " She",
    " li",
    "ked",
    "\n",
    " 7",
]


def made_up_text(index: int, tokens: int, generator: np.random.Generator) -> ExplorerText:
    """One text over `WORDS`; its numbers are random, its explanations have three words."""

    def numbers(low: float, high: float) -> list[float]:
        return [float(f"{value:.4g}") for value in generator.uniform(low, high, tokens)]

    def top() -> list[list[Any]]:
        places = generator.integers(len(WORDS), size=(tokens, 5)).tolist()
        shares = np.sort(generator.dirichlet(np.ones(5), tokens))[:, ::-1].round(4).tolist()
        return [[part for pair in zip(*of, strict=True) for part in pair] for of in zip(places, shares, strict=True)]

    explained = [[WORDS[place] for place in of] for of in generator.integers(1, 9, size=(tokens, 3)).tolist()]
    return ExplorerText(
        title=f"Story {index}", tokens=generator.integers(len(WORDS), size=tokens).tolist(),
        positions=list(range(1, tokens + 1)), explanations=explained,
        losses=generator.uniform(-0.2, 1.2, (tokens, 3)).round(3).tolist(), fve=numbers(-0.3, 1),
        kl=numbers(0, 5), norm=numbers(3, 9), variance=numbers(10, 30), before=top(), after=top(),
    )  # fmt: skip


def made_up_explorer(texts: int = 3, tokens: int = 40) -> Explorer:
    """`texts` texts of `tokens` tokens each."""
    generator = np.random.default_rng(0)
    return Explorer(
        format=EXPLORER_FORMAT, version=EXPLORER_VERSION, source="Made up texts", lens=None, max_tokens=texts * tokens,
        ablation=True,
        words=list(WORDS), texts=[made_up_text(index, tokens, generator) for index in range(texts)],
    )  # fmt: skip


def made_up_report(explorer: Explorer | None = None, **parts: Any) -> ReportDocument:
    """A report with an explorer and nothing else but what is given."""
    report = ReportDocument(
        format=FORMAT, version=VERSION, title="A made up lens", lead=["Read in tests."], figures=[], comparison=[],
        verdict={}, examples=[], explorer=explorer, profiles=None if explorer is None else profiles(explorer),
        heatmap=None, curves=None, cases=None, best_of_n=[], readers=[], text_length=[], linear_probe=[],
        tables=[], provenance=[], notes=[],
    )  # fmt: skip
    return report | parts  # type: ignore[return-value]


def made_up_text_length() -> dict[str, Any]:
    """What `text_length` leaves in `metrics.json` of a text of three tokens."""
    values = {"first": [0.1, 0.3, 0.6], "last": [0.4, 0.5, 0.6], "context_tail": [0.5, 0.6, 0.7]}
    return {"tokens": [1, 2, 3]} | {
        part: {
            "fve": fve, "fve_ci95": [[value - 0.02, value + 0.03] for value in fve],
            "kl_recovered": [value + 0.2 for value in fve],
            "kl_recovered_ci95": [[value + 0.1, value + 0.25] for value in fve],
        }
        for part, fve in values.items()
    }  # fmt: skip
