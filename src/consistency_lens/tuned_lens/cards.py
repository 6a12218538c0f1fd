"""NOTICE and cards of published tuned lenses, rendered from provenance and index; nothing in them is typed by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import DatasetCardData, HfApi, ModelCardData

from ..atomic_write import write_text
from ..evaluation.report import markdown_table
from ..hub.cards import (
    LIBRARY,
    NOT_MEASURED,
    citation,
    hub_link,
    license_link,
    license_metadata,
    render,
)
from ..hub.upstream_license import UpstreamLicense
from ..lens_artifact import WEIGHTS_FILE
from .content_checks import FULL
from .depth import DEPTHS
from .gates import REQUIREMENTS
from .index import LICENSES, TREE, IndexEntry
from .kpis import COVERAGE, DELTA, EARLINESS, LAST_LAYER, RANKS
from .lens_places import METRICS_FILE
from .public_files import DATASET_KEY, MODEL_KEY, is_local
from .tables import kl_markdown

TAGS = (LIBRARY, "tuned-lens", "interpretability")
CARD, NOTICE = "README.md", "NOTICE"
METHOD = """@article{belrose2023eliciting,
  title = {Eliciting Latent Predictions from Transformers with the Tuned Lens},
  author = {Belrose, Nora and others},
  journal = {arXiv preprint arXiv:2303.08112},
  year = {2023},
}"""
PASSED = {True: "passed", False: "**not passed**"}


def write_notice(
    folder: Path,
    model: str,
    repo: str,
    tag: str,
    provenance: Mapping[str, Any],
    license: UpstreamLicense,
    texts: Sequence[str],
) -> None:
    """Writes `NOTICE`: whose licence holds, and where it is.

    Args:
        model: as INDEX.json names it.
        texts: paths of the licence texts in the repository.
    """
    commit = provenance.get("model_commit")
    text = render(
        "tuned_lens_notice.txt.jinja",
        model=model,
        local_model=is_local(provenance, MODEL_KEY),
        commit=commit,
        tokenizer_commit=provenance.get("tokenizer_commit"),
        license=license.name,
        title=license.title,
        link=license.link,
        texts=[f"{_url(repo)}/blob/{tag}/{text}" for text in texts],
        card=None if is_local(provenance, MODEL_KEY) else f"{HfApi().endpoint}/{model}/blob/{commit}/README.md",
        dataset=provenance["dataset"]["repo_id"],
    )
    write_text(folder / NOTICE, text)


def write_lens_card(
    folder: Path,
    model: str,
    repo: str,
    tag: str,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    license: UpstreamLicense,
) -> None:
    """Writes `README.md` of one lens that is published, whose weights and figures lie in the folder."""
    figures = folder / METRICS_FILE
    metrics = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {}
    place = CardPlace(model, f"{TREE}/{model}", repo, tag, (folder / WEIGHTS_FILE).stat().st_size)
    write_text(folder / CARD, lens_card(place, config, provenance, metrics, license))


class CardPlace(NamedTuple):
    """Where the lens of a card is."""

    model: str
    """As INDEX.json names it, or the card of a lens that is not published."""
    path: str
    """Of its folder: in the repository, or here."""
    repo: str | None = None
    """None for a lens that is not published."""
    tag: str | None = None
    size: int | None = None
    """Of its weights, in bytes."""


def lens_card(
    place: CardPlace,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
    license: UpstreamLicense,
) -> str:
    """The card of one lens, from what its folder holds.

    Args:
        metrics: of the fit, for the layers.
        license: of the model.
    """
    local, commit = is_local(provenance, MODEL_KEY), provenance.get("model_commit")
    on_hub = None if local else place.model
    of_base: dict[str, Any] = {} if local else {"base_model_relation": "adapter"}
    of_base |= license_metadata(license, on_hub, commit)
    card = ModelCardData(library_name=LIBRARY, tags=list(TAGS), base_model=on_hub, **of_base)
    kpis, acceptance = provenance.get("kpis") or {}, provenance.get("acceptance") or {}
    return render(
        "tuned_lens_card.md.jinja",
        metadata=card.to_yaml(),
        model=place.model,
        local_model=local,
        clean_name=place.model.rpartition("/")[2],
        commit=commit,
        tokenizer_source=f'"{place.model}", revision="{provenance.get("tokenizer_commit")}"',
        link=_model_link(place.model, provenance),
        facts=_facts(place, config, provenance, license),
        prompts=_prompts(kpis),
        kpis=markdown_table(("figure", "value", "95% interval"), _kpi_rows(kpis)),
        gates=markdown_table(
            ("gate", "asks for", ""),
            [(gate, wanted, _verdict(acceptance.get(f"gate_{gate}"))) for gate, wanted in REQUIREMENTS.items()],
            numbers=False,
        ),
        layers=kl_markdown(metrics) if "kl" in metrics else "",
        positions=metrics.get("positions"),
        repo=place.repo,
        tag=place.tag,
        path=place.path,
        license=license,
        license_section=place.repo is None,
        license_link=license_link(license.link, on_hub, commit) if license.link else None,
        citation=f"{citation(provenance.get('versions'))}\n\n{METHOD}",
        versions=provenance.get("versions"),
        source=provenance.get("sha"),
    )


def _verdict(passed: bool | None) -> str:
    return NOT_MEASURED if passed is None else PASSED[passed]


def _facts(
    place: CardPlace, config: Mapping[str, Any], provenance: Mapping[str, Any], license: UpstreamLicense
) -> list[tuple[str, str]]:
    translator, width, layers = provenance["translator"], config["width"], config["num_layers"]
    rank = config["rank"]  # None where the provenance says full
    each = f"{width}² + {width}" if rank is None else f"2·{width}·{rank} + {width}"
    numbers = (layers - 1) * (width**2 + width if rank is None else 2 * width * rank + width)
    temperatures = ", a temperature each" if translator.get("temperature") else ""
    commit = provenance.get("model_commit")
    return [
        ("model commit", f"`{commit}`" if commit else "none: a local model"),
        ("sha256 of the model's weights", f"`{provenance['weights_hash']}`"),
        *([("release", place.tag)] if place.tag else []),
        ("translators", f"{layers - 1} of {layers} layers, rank {rank or 'full'}{temperatures}"),
        ("parameters", f"{numbers:,} = {layers - 1} x ({each})"),
        *([("size on disk", f"{place.size:,} bytes")] if place.size else []),
        ("preconditioner (Prism/ZCA)", config["preconditioner"]),
        ("optimiser", _optimiser(provenance)),
        ("text", _dataset_link(provenance)),
        ("tokens", _tokens(provenance)),
        ("seed", str(provenance["seed"])),
        ("model licence", license.title or license.name or "none is stated"),
    ]


def _optimiser(provenance: Mapping[str, Any]) -> str:
    """The closed form, and the KL steps after it."""
    ridge, optim, schedule = (provenance.get(name) or {} for name in ("ridge", "optim", "schedule"))
    closed = f"ridge regression, penalty {ridge['penalty']:g}" if "penalty" in ridge else "ridge regression"
    if not schedule.get("steps_done"):
        return closed
    steps = f"{schedule['steps_done']:,} KL steps"
    if "name" not in optim:
        return f"{closed}; then {steps}"
    return f"{closed}; then {steps} of {optim['name']}, learning rate {optim['lr']:g}, {optim['schedule']}"


def _prompts(kpis: Mapping[str, Any]) -> str:
    """Which prompts the lens was judged on."""
    suite = kpis.get("suite") or {}
    count = f"{kpis['prompts']} prompts" if "prompts" in kpis else "prompts"
    return f"{count} of the suite {suite['name']}" if suite.get("name") else count


def _kpi_rows(kpis: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures with their intervals, for people."""
    intervals = kpis.get("ci95") or {}
    missing, without = [NOT_MEASURED] * len(DEPTHS), [None] * len(DEPTHS)  # as many as ranks
    deltas = zip(DEPTHS, kpis.get(DELTA, missing), intervals.get(DELTA, without), strict=True)
    shifts = zip(RANKS, kpis.get(EARLINESS, missing), intervals.get(EARLINESS, without), strict=True)
    last, coverage = "last layer: KL after temperature, bits", "gain in layers with the answer on top"
    figures = [
        *((f"median ΔKL at {depth} % depth, bits", value, ends, "+.3f") for depth, value, ends in deltas),
        *((f"layers by which rank ≤ {rank} is earlier, median", value, ends, "+g") for rank, value, ends in shifts),
        (last, kpis.get(LAST_LAYER, NOT_MEASURED), intervals.get(LAST_LAYER), ".2g"),
        (coverage, kpis.get(COVERAGE, NOT_MEASURED), intervals.get(COVERAGE), "+.1%"),
    ]
    return [(label, _number(value, form), _interval(ends, form)) for label, value, ends, form in figures]


def _number(value: float | str | None, form: str) -> str:
    """A figure; None is one that no prompt had."""
    if isinstance(value, str):
        return value
    return "not to be had" if value is None else format(value, form)


def _interval(ends: Sequence[float] | None, form: str) -> str:
    return "" if ends is None else " to ".join(format(end, form) for end in ends)


def write_dataset_card(
    folder: Path,
    repo: str,
    tag: str,
    entries: Mapping[str, IndexEntry],
    provenances: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes `README.md` of a repository of tuned lenses.

    Args:
        entries: all that the release holds.
        provenances: of each of them, as they are published.
    """
    names = sorted(entries)
    stated = sorted({entry.license for entry in entries.values() if entry.license is not None})
    card = DatasetCardData(license=stated[0] if len(stated) == 1 else stated or None, tags=list(TAGS), viewer=False)
    url = _url(repo)
    text = render(
        "tuned_lens_dataset_card.md.jinja",
        metadata=card.to_yaml(),
        name=repo.rpartition("/")[2],
        repo=repo,
        tag=tag,
        url=url,
        requirements=REQUIREMENTS,
        models=markdown_table(
            ("model", "release", *(f"gate {gate}" for gate in REQUIREMENTS)),
            [_gate_row(name, entries[name], provenances[name]) for name in names],
            numbers=False,
        ),
        training=markdown_table(
            ("model", "text", "tokens", "positions", "rank", "KL steps", "preconditioner", "seed"),
            [_training_row(name, provenances[name]) for name in names],
            numbers=False,
        ),
        translators=", ".join(sorted({_parts(provenances[name]) for name in names})),
        licenses=markdown_table(
            ("model", "licence", "texts"), [_license_row(name, entries[name]) for name in names], numbers=False
        ),
    )
    write_text(folder / CARD, text)


def _gate_row(name: str, entry: IndexEntry, provenance: Mapping[str, Any]) -> tuple[str, ...]:
    gates = (PASSED[entry.acceptance[f"gate_{gate}"]] for gate in REQUIREMENTS)
    return (f"{_model_link(name, provenance)} ([card]({entry.path}/{CARD}))", entry.tl_version, *gates)


def _training_row(name: str, provenance: Mapping[str, Any]) -> tuple[str, ...]:
    budget, translator = provenance["budget"], provenance["translator"]
    return (
        name,
        _dataset_link(provenance),
        _tokens(provenance),
        f"{budget['positions_per_seq']} of {budget['seq_len']}",
        str(translator["rank"]),
        str((provenance.get("schedule") or {}).get("steps_done", 0)),
        (provenance.get("preconditioner") or {}).get("type", "none"),
        str(provenance["seed"]),
    )


def _parts(provenance: Mapping[str, Any]) -> str:
    translator = provenance["translator"]
    shape = "of full rank" if translator["rank"] == FULL else "of the identity and a low rank"
    return f"{shape}, {'with' if translator.get('temperature') else 'without'} a temperature for each layer"


def _license_row(name: str, entry: IndexEntry) -> tuple[str, ...]:
    texts = ", ".join(f"[{text.removeprefix(f'{LICENSES}/')}]({text})" for text in entry.licenses)
    return name, entry.license or "none is stated", texts or "none was to be had; see the model's own card"


def _tokens(provenance: Mapping[str, Any]) -> str:
    """What was read, as it was counted; the budget where nothing was counted."""
    consumed = {name: count for name, count in (provenance.get("tokens_consumed") or {}).items() if count}
    if not consumed:
        return f"{provenance['budget']['tokens']:,}"
    return ", ".join(f"{count:,} ({name})" for name, count in consumed.items())


def _dataset_link(provenance: Mapping[str, Any]) -> str:
    dataset = provenance["dataset"]
    revision = None if is_local(provenance, DATASET_KEY) else dataset.get("revision") or dataset.get("commit")
    parts = [part for part in (dataset.get("name"), dataset.get("split")) if part]
    return ", ".join([hub_link(dataset["repo_id"], revision, "datasets/"), *parts])


def _model_link(model: str, provenance: Mapping[str, Any]) -> str:
    return hub_link(model, None if is_local(provenance, MODEL_KEY) else provenance["model_commit"])


def _url(repo: str) -> str:
    return f"{HfApi().endpoint}/datasets/{repo}"
