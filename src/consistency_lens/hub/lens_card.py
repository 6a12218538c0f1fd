"""The model card of a lens, or of a decoder or encoder alone, written from the files in its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..atomic_write import write_text
from ..configuration_consistency_lens import ConsistencyLensConfig, LensDecoderConfig, LensEncoderConfig
from ..data.cache_description import corpus_facts
from ..evaluation.samples import Sample
from .cards import LIBRARY, NOT_RECORDED, TAGS, citation, count, hub_link, license_link, license_metadata, render
from .lens_figures import all_figures, eval_results, glance
from .lens_folder import LensFolder, public, read_lens_folder
from .lens_training import (
    LOG_ROWS,
    evaluation_table,
    log_table,
    settings,
    stage_table,
    training_facts,
)
from .markdown import code, literal, plain, table
from .upstream_license import UpstreamLicense, license_in_card

CARD = "README.md"
KINDS = {ConsistencyLensConfig: "lens", LensDecoderConfig: "decoder", LensEncoderConfig: "encoder"}
# The Hub's name for what comes nearest: a lens and an encoder find features, a decoder writes text.
PIPELINE_TAGS = {"lens": "feature-extraction", "decoder": "text-generation", "encoder": "feature-extraction"}
CONTEXT_WIDTH = 160  # characters of a sample's context that are shown, up to the token that is read
LONGEST_WORD = 24
SAMPLE_COLUMNS = ("context", "words", "FVE", "KL", "next before", "next after")


def write_lens_card(folder: str | Path, repo: str | None = None, **place: Any) -> Path:
    """Writes `README.md` into the folder of a lens, decoder or encoder; see `lens_card`."""
    path = Path(folder) / CARD
    write_text(path, lens_card(folder, repo, **place))
    return path


def lens_card(
    folder: str | Path,
    repo: str | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    location: str | None = None,
    license: UpstreamLicense | None = None,
) -> str:
    """The card of a lens, decoder or encoder, from what lies in its folder.

    Args:
        folder: with config.json and, as far as they were written, `provenance.json, run.json, metrics.json,
            samples.jsonl, log_history.json` and `emissions.csv`. What is missing shows as not measured.
        repo: id that it is published at; None for one that stays where it is.
        subfolder, revision: where in the repository it is.
        location: path that the examples of a card without a repository name; by default the folder as it is given.
        license: of the base model; by default as the training recorded it, or as the base model's own card says.

    Raises:
        ValueError: if the folder holds no lens, decoder or encoder, or a file in it cannot be read.
    """
    lens = read_lens_folder(folder)
    license = license or _license(lens, ask_hub=repo is not None)
    kind = KINDS[type(lens.config)]
    place = repo if repo is not None else location or str(folder)
    name = (subfolder or place).rstrip("/").rpartition("/")[2] or lens.path.resolve().name
    metrics, base_revision = lens.metrics, lens.base_revision
    on_hub = base_revision is not None
    local = f"{code(lens.base)}, a local model" if lens.base else "a model that was not recorded"
    where = {"subfolder": subfolder, "revision": revision}
    path_of_base = f"path/of/{Path(lens.base).name or 'the-base-model'}" if repo is not None else lens.base
    log_rows = sum("loss" in entry for entry in lens.log)
    current = metrics.get("controls", {}).get("current_token_only", {}).get("fve")
    return render(
        "lens_card.md.jinja",
        metadata=metadata(lens, kind, name, license).to_yaml(),
        kind=kind,
        name=name,
        base=hub_link(lens.base, base_revision) if on_hub else local,
        base_name=lens.base,
        is_local=not on_hub and repo is not None,
        layer=lens.clone.layer,
        tokens=lens.clone.num_text_tokens,
        glance=glance(metrics, lens.clone.num_text_tokens),
        rows=metrics.get("rows"),
        documents=metrics.get("documents"),
        arguments=_call(place, **where, base_model=path_of_base if not on_hub and repo is not None else None),
        base_arguments=_call(lens.base if on_hub else path_of_base, revision=base_revision),
        with_code=lens.with_code,
        samples=sample_table(lens.samples) if lens.samples else "",
        facts=reading_facts(lens, kind),
        figures=all_figures(metrics),
        stages=stage_table(lens.run),
        training=training_facts(lens),
        settings=settings(lens.run),
        log=log_table(lens.log),
        log_rows=log_rows,
        log_is_thinned=log_rows > LOG_ROWS,
        evaluations=evaluation_table(lens.log),
        own=metrics.get("fve"),
        current_token=current,
        license=license,
        license_link=license_link(license.link, lens.base if on_hub else None, base_revision)
        if license.link
        else None,
        holds=held_weights(lens),
        citation=citation(lens.provenance.get("versions")),
        versions=lens.provenance.get("versions"),
        commit=lens.provenance.get("git_commit"),
    )


def metadata(lens: LensFolder, kind: str, name: str, license: UpstreamLicense) -> ModelCardData:
    """The head of the card, as the Hub reads it."""
    on_hub = lens.base_revision is not None
    dataset, dataset_revision = _dataset(lens.metrics.get("data") or lens.data)
    results = eval_results(lens.metrics, PIPELINE_TAGS[kind], dataset, dataset_revision is not None, dataset_revision)
    relation = "finetune" if _is_full(lens) else "adapter"
    extra: dict[str, Any] = {"base_model_relation": relation} if on_hub else {}
    if lens.emissions is not None:
        of = lens.emissions
        extra["co2_eq_emissions"] = {
            "emissions": of.kg * 1000,  # grams
            "source": "codecarbon",
            "training_type": "fine-tuning",
            **({"geographical_location": of.country} if of.country else {}),
            **({"hardware_used": of.hardware} if of.hardware else {}),
        }
    return ModelCardData(
        library_name=LIBRARY,
        base_model=lens.base if on_hub else None,
        datasets=_datasets_on_hub(lens) or None,
        pipeline_tag=PIPELINE_TAGS[kind],
        tags=[*TAGS, "activations", *([f"{LIBRARY}-{kind}"] if kind != "lens" else [])],
        model_name=name if results else None,
        eval_results=results or None,
        **license_metadata(license, lens.base if on_hub else None, lens.base_revision),
        **extra,
    )


def reading_facts(lens: LensFolder, kind: str) -> list[tuple[str, str]]:
    """Label and value of what is read and what reads it."""
    clone, data, of = lens.clone, lens.data, lens.provenance
    sizes = clone.base_config.get("text_config") or clone.base_config
    blocks = next((sizes[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in sizes), None)
    dataset, dataset_revision = _dataset(data)
    rows: list[tuple[str, str]] = [
        ("base model", hub_link(lens.base, lens.base_revision) if lens.base else NOT_RECORDED),
        ("sha256 of its weights", code(data["weights_hash"]) if "weights_hash" in data else NOT_RECORDED),
        (
            "layer",
            f"{clone.layer}, the output of block {clone.layer} counted from 0" + (f", of {blocks}" * bool(blocks)),
        ),
        ("tokens of a text (T)", str(clone.num_text_tokens)),
    ]
    parts = {"decoder": lens.config, "encoder": lens.config}
    if isinstance(lens.config, ConsistencyLensConfig):
        parts = {"decoder": lens.config.decoder, "encoder": lens.config.encoder}
    rows += [(part, clone_text(parts[part])) for part in parts if kind in ("lens", part)]
    rows.append(("text", hub_link(dataset, dataset_revision, "datasets/") if data.get("dataset") else NOT_RECORDED))
    rows += [(label, plain(value)) for label, value in corpus_facts(data)]
    origin = data.get("streamed_from") or data.get("pulled_from")
    if origin:
        rows.append(("activations", hub_link(origin["repo"], origin["commit"], "datasets/")))
    if "positions" in data:
        rows.append(("positions", positions_text(data["positions"])))
    held = [
        f"{count(of[name])} {what}"
        for name, what in (("train_rows", "for training"), ("validation_rows", "held out"))
        if name in of
    ]
    return [*rows, ("activations read", ", ".join(held) or NOT_RECORDED)]


def positions_text(positions: Mapping[str, Any]) -> str:
    """Which positions of a sequence were read; activations that were read on the fly name no rule."""
    rule = [positions["rule"]] if "rule" in positions else []
    least = f"min_position {positions['min_position']}"
    return plain("; ".join([*rule, f"up to {positions['per_sequence']} of a sequence, {least}"]))


def clone_text(config: Any) -> str:
    """What a decoder or an encoder is made of."""
    lora = f", rank {config.lora['r']}" if config.training == "lora" and "r" in config.lora else ""
    parts = [f"{config.training} clone{lora}", f"prompt {code(config.prompt)}"]
    if isinstance(config, LensDecoderConfig):
        if config.injection_layers:
            parts.append(f"the activation enters blocks 1 to {config.injection_layers} too")
        parts.append("texts may end early" if config.stop_token_id is not None else "texts of always T tokens")
    else:
        parts.append(f"{config.layer + 1 if config.output_layer is None else config.output_layer} blocks")
    return "; ".join(parts)


def sample_table(samples: list[Sample]) -> str:
    """Contexts up to the token that is read, the words and what they were worth."""
    rows = [
        (
            _context(sample.context),
            plain(sample.explanation.strip()) or "(no words)",
            f"{sample.fve:.2f}",
            f"{sample.kl:.2f}",
            _prediction(sample.top_before),
            _prediction(sample.top_after),
        )
        for sample in samples
    ]
    return table(SAMPLE_COLUMNS, rows, numbers=False)


def held_weights(lens: LensFolder) -> str:
    """What of the base model is in the weights."""
    if _is_full(lens):
        return "The weights are trained copies of that model's."
    return "The weights are adapters, projections and prompts that were trained on that model, without its own."


def _context(text: str) -> str:
    """The end of a context from a word on, the token that is read in bold."""
    if len(text) > CONTEXT_WIDTH:
        end = text[-CONTEXT_WIDTH:]
        # a text without spaces is cut where it is
        text = f"…{end[end.index(' ') :] if ' ' in end[:LONGEST_WORD] else end}"
    before, mark, token = text.rpartition("«")
    return f"{plain(before)}<b>{plain(mark + token)}</b>" if mark else plain(text)


def _prediction(top: list[tuple[str, float]]) -> str:
    token, probability = top[0]
    return f"{code(token.strip() or repr(token))} {probability:.0%}"


def _call(place: str, **arguments: str | None) -> str:
    """The arguments of a `from_pretrained`."""
    given = [f"{name}={literal(value)}" for name, value in arguments.items() if value is not None]
    return ", ".join([literal(place), *given])


def _is_full(lens: LensFolder) -> bool:
    """Whether a whole clone was trained."""
    config = lens.config
    parts = [config.decoder, config.encoder] if isinstance(config, ConsistencyLensConfig) else [config]
    return any(part.training == "full" for part in parts)


def _dataset(provenance: Mapping[str, Any]) -> tuple[str, str | None]:
    """The data set whose text was read, and its commit if it is on the Hub."""
    revision = provenance.get("dataset_revision")
    return public(provenance.get("dataset") or NOT_RECORDED, revision), revision


def _datasets_on_hub(lens: LensFolder) -> list[str]:
    data = lens.data
    origin = data.get("streamed_from") or data.get("pulled_from")
    names = [data["dataset"]] if data.get("dataset_revision") is not None else []
    return [*names, *([origin["repo"]] if origin else [])]


def _license(lens: LensFolder, ask_hub: bool) -> UpstreamLicense:
    recorded = lens.provenance.get("base_license") or {}
    if recorded.get("name") is not None:
        return UpstreamLicense(recorded["name"], recorded.get("title"), recorded.get("link"), {})
    base = lens.clone.base_model_name_or_path
    if base and (lens.base_revision is None or ask_hub):
        return license_in_card(base, lens.base_revision)
    return UpstreamLicense(None, None, None, {})
