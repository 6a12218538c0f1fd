"""A report as one JSON document, which is all that the page knows: what it holds, and how it comes from a run.

Parts that a run has nothing for are null or empty, and `notes` say why. Numbers are finite or null.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from .. import __version__
from .cases import Case, Cases, cases, sample_cases, spread
from .curves import Curves, curves
from .explorer import Explorer
from .figures import (
    BestOf,
    Compared,
    Figure,
    Probed,
    ReadInPart,
    Table,
    best_of_n,
    comparison,
    figures,
    linear_probe,
    readers,
    tables,
    text_length,
    verdict,
)
from .profiles import Profiles, profiles
from .run_folder import RunFolder

FORMAT, VERSION = "consistency-lens-report", 1
HASH_SHOWN = 16  # characters
Part = TypeVar("Part")


class ReportDocument(TypedDict):
    """What the page shows, from top to bottom."""

    format: str
    version: int
    title: str
    lead: list[str]
    """Sentences: what was read, and on what it was measured."""
    figures: list[Figure]
    comparison: list[Compared]
    """The lens first, then its controls."""
    verdict: dict[str, list[str]]
    """Labels of controls that the lens is `above`, `level` with and `below`, by FVE."""
    examples: list[Case]
    """Held-out samples, evenly spread from high to low FVE."""
    explorer: Explorer | None
    profiles: Profiles | None
    heatmap: dict[str, Any] | None
    """What `tuned_lens.heatmap.heatmap_data` gives."""
    curves: Curves | None
    cases: Cases | None
    best_of_n: list[BestOf]
    text_length: list[ReadInPart]
    readers: list[Compared]
    linear_probe: list[Probed]
    tables: list[Table]
    provenance: list[list[str]]
    """Pairs of name and value."""
    notes: list[str]
    """What is lacking, and how it is to be had."""


def report_document(
    run: RunFolder,
    explorer: Explorer | None = None,
    heatmap: dict[str, Any] | None = None,
    notes: list[str] | None = None,
) -> ReportDocument:
    """Assembles a report.

    Args:
        run: what the run has left.
        explorer: texts as its lens reads them.
        heatmap: what a tuned lens of the same subject reads.
        notes: what is lacking besides the files of the run.
    """
    parts, metrics = Parts(), run.metrics
    measured = partial(parts.of, "metrics.json")
    compared = measured("controls", lambda: comparison(metrics), [])
    samples = parts.of("samples.jsonl", "samples", lambda: sample_cases(run.samples), [])
    return ReportDocument(
        format=FORMAT,
        version=VERSION,
        title=title_of(run),
        lead=measured("rows and documents", lambda: lead(run), []),
        figures=measured("figures", lambda: figures(metrics), []),
        comparison=compared,
        verdict=measured("intervals", lambda: verdict(compared), {}),
        examples=spread(samples),
        explorer=explorer,
        profiles=None if explorer is None else profiles(explorer),
        heatmap=heatmap,
        curves=parts.of("log_history.json", "training curves", lambda: curves(run), None),
        cases=cases(explorer, samples),
        best_of_n=measured("best of n texts", lambda: best_of_n(metrics), []),
        text_length=measured("lengths of text", lambda: text_length(metrics), []),
        readers=measured("readers", lambda: readers(metrics), []),
        linear_probe=measured("linear probe", lambda: linear_probe(metrics), []),
        tables=measured("tables of checks", lambda: tables(metrics), []),
        provenance=parts.of("provenance.json or run.json", "provenance", lambda: provenance(run), []),
        notes=[*(notes or []), *run.notes, *parts.left_out],
    )


class Parts:
    """Parts of a report, made from files that another version may have written, or a hand.

    Attributes:
        left_out: for people, the parts that could not be made.
    """

    def __init__(self) -> None:
        self.left_out: list[str] = []

    def of(self, file: str, name: str, make: Callable[[], Part], empty: Any) -> Part:
        """What `make` gives, or `empty` where the file does not hold what it looks for."""
        try:
            return make()
        except KeyError as missing:
            cause = f"has no {missing} there"
        except (TypeError, ValueError, AttributeError) as error:
            cause = str(error)
        self.left_out.append(f"Without {name}: {file} is not as this version writes it ({cause}).")
        return empty


def title_of(run: RunFolder) -> str:
    """What was read."""
    recipe = run.recipe
    if "model" not in recipe or "layer" not in recipe:
        return f"The lens in {run.path.resolve().name}"
    return f"{Path(str(recipe['model'])).name}, layer {recipe['layer']}, in words"


def lead(run: RunFolder) -> list[str]:
    """What was read, and on what it was measured."""
    recipe, metrics, sentences = run.recipe, run.metrics, []
    if "model" in recipe and "layer" in recipe:
        length = f"{recipe['num_text_tokens']} tokens of text" if "num_text_tokens" in recipe else "a short text"
        sentences.append(
            f"The output of block {recipe['layer']} of {recipe['model']} is put into {length}, and rebuilt from that "
            "text alone."
        )
    if "rows" in metrics and "documents" in metrics:
        sentences.append(
            f"Measured on {metrics['rows']:,} activations of {metrics['documents']:,} documents that the training "
            "held out; intervals are 95%, by bootstrap over documents."
        )
    return sentences


def provenance(run: RunFolder) -> list[list[str]]:
    """Where the lens is from: subject, data, hashes, versions, machine and time."""
    of, cache = run.provenance, run.provenance.get("cache", {})
    found = {
        "run": run.path.resolve().name,
        "subject": run.recipe.get("model"),
        "subject's revision": run.recipe.get("revision") or of.get("base_model_revision"),
        "layer": run.recipe.get("layer"),
        "text tokens": run.recipe.get("num_text_tokens"),
        "stages": ", ".join(map(str, run.training.get("stages") or [])),
        "steps": run.training.get("max_steps"),
        "seed": of.get("seed", run.training.get("seed")),
        "dataset": run.recipe.get("dataset") or cache.get("dataset"),
        "hash of the weights": shortened(cache.get("weights_hash")),
        "hash of the tokenizer": shortened(cache.get("tokenizer_hash")),
        "hash of the text": shortened(cache.get("dataset_hash")),
        "held out": of.get("held_out_fraction"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions(of).items()),
        "machine": ", ".join(f"{name} {value}" for name, value in run.run.get("machine", {}).items()),
        "seconds": ", ".join(f"{name} {seconds:.0f}" for name, seconds in run.run.get("laps", {}).items()),
        "report": f"written by consistency-lens {__version__}",
    }
    return [[name, str(value)] for name, value in found.items() if value not in (None, "")]


def versions(provenance: dict[str, Any]) -> dict[str, str]:
    """The libraries that the lens, or else its activations, were made with."""
    return provenance.get("versions") or provenance.get("cache", {}).get("versions") or {}


def shortened(value: Any) -> str | None:
    return str(value)[:HASH_SHOWN] if value else None
