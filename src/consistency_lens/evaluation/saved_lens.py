"""The evaluation of a saved lens on the documents that its training held out: the work of `consistency-lens eval`."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..atomic_write import check_writable
from ..configuration_consistency_lens import ConsistencyLensConfig
from ..data.collator import ActivationCollator
from ..data.sources import CACHE, ON_THE_FLY, Reader, SourceArguments, SplitRows, cache_folder, open_rows
from ..data.subject_loading import DTYPES
from ..hub.lens_card import write_lens_card
from ..modeling_consistency_lens import ConsistencyLensModel
from ..own_subject import check_known, is_known
from .arguments import CHECKS, EvaluationArguments
from .evaluator import Evaluator, write_metrics
from .samples import Sample, collect_samples, write_samples


@dataclass
class LensArguments:
    """Which lens is loaded, and how."""

    lens: str = field(default="", metadata={"help": "Folder or Hub id of the lens."})
    model: str | None = field(
        default=None, metadata={"help": "The subject, where it is not to be found at the place that the lens names."}
    )
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the lens on the Hub."})
    device: str | None = field(
        default=None, metadata={"help": "Such as cpu or cuda:1; default: a GPU if there is one."}
    )
    dtype: str | None = field(default=None, metadata={"help": "Precision of the weights; default: as in training."})

    def __post_init__(self) -> None:
        if not self.lens:
            raise ValueError("lens: got none; pass the folder or Hub id of a lens, e.g. --lens outputs/tiny_stories")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass
class ReadingArguments(LensArguments):
    """Which lens reads texts, of its own subject or of another; nothing is kept of what it says."""

    verify_base: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the subject must have the very weights that the lens was made for; false takes any model "
            "of the architecture, such as a fine-tuned one; default: compared where no commit pins them, if they are "
            "loaded in the precision of the training."
        },
    )


@dataclass
class SavedLensArguments(LensArguments):
    """Which lens is evaluated, on which activations, and where the figures go."""

    activations: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a cache, Hub id of a published one, or on_the_fly; default: those that the lens was "
            "trained on."
        },
    )
    activations_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of published activations."}
    )
    validation_fraction: float | None = field(
        default=None, metadata={"help": "Share of the documents held out; default: as in the lens's training."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the figures; default: the lens's own, or `evaluation` in it for some checks only."
        },
    )
    num_samples: int = field(default=12, metadata={"help": "Sample rows shown and written."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")
        if self.output_dir is None and not Path(self.lens).is_dir():
            raise ValueError(f"output_dir: the lens {self.lens!r} is no folder to write into; pass --output_dir")


@dataclass
class WholeEvaluationArguments(EvaluationArguments):
    """How a finished lens is evaluated: with every check."""

    checks: list[str] = field(
        default_factory=lambda: list(CHECKS),
        metadata={"help": f"Any of {', '.join(CHECKS)}, each takes its time; or none. By default all."},
    )

    def __post_init__(self) -> None:
        if self.checks == ["none"]:
            self.checks = []
        super().__post_init__()


def evaluate_saved_lens(
    args: SavedLensArguments, evaluation: EvaluationArguments
) -> tuple[dict[str, Any], list[Sample], Path]:
    """Measures a saved lens on held-out rows; writes figures and samples, and renews the card of a lens's own folder.

    On the rows and with the seed of the training's own evaluation the figures are the same.

    Returns:
        The metrics, the samples and the folder that they were written to.

    Raises:
        ValueError: if lens or cache are not to be found, or do not belong together, or the figures would be the
            lens's own and the subject may not be.
    """
    folder = output_folder(args, evaluation)
    lens = load_lens(args)
    if args.output_dir is None or is_own_folder(args, folder):
        check_subject(args, lens, "pass another --output_dir")
    source = source_arguments(args, lens)
    rows = open_held_out(args, source, lens)
    collator = collator_for(lens)
    metrics = Evaluator(lens, rows.held_out, collator, evaluation, train_rows=rows.true_text)()
    samples = collect_samples(lens, rows.held_out, collator, count=args.num_samples, seed=evaluation.seed)
    resolved = {"lens": asdict(args) | {"activations": source.activations}, "evaluation": asdict(evaluation)}
    data = {name: rows.provenance.get(name) for name in ("dataset", "dataset_revision")}
    write_metrics(folder / "metrics.json", metrics | {"data": data}, {**resolved, "recipe": recipe_of(lens)})
    write_samples(folder / "samples.jsonl", samples)
    if is_own_folder(args, folder):
        write_lens_card(folder)
    return metrics, samples, folder


def output_folder(args: SavedLensArguments, evaluation: EvaluationArguments) -> Path:
    """Where the figures go: the lens's own folder for a whole evaluation, one inside it for a part of one.

    Raises:
        ValueError: if it cannot be made, or written to.
    """
    whole = evaluation.controls is None and set(evaluation.checks) == set(CHECKS)
    folder = Path(args.output_dir) if args.output_dir else Path(args.lens) / ("" if whole else "evaluation")
    check_writable(folder, "output_dir")
    return folder


def is_own_folder(args: LensArguments, folder: Path) -> bool:
    """Whether a folder is the lens's own."""
    return folder.resolve() == Path(args.lens).resolve()


def check_subject(args: LensArguments, lens: ConsistencyLensModel, otherwise: str) -> None:
    """Checks that the subject of a lens that was loaded is known to be its own; see `check_known`."""
    check_known(lens, lens.subject.model, is_at_its_commit(args, lens), args.model is not None, otherwise)


def is_at_its_commit(args: LensArguments, lens: ConsistencyLensModel) -> bool:
    """Whether the subject was loaded at the commit that the lens pins."""
    return args.model is None and lens.config.base_model_revision is not None


def load_lens(args: LensArguments, verify_base: bool | None = None) -> ConsistencyLensModel:
    """The lens with its subject, on its device; for `verify_base` see `from_pretrained`.

    Raises:
        ValueError: if there is none at `args.lens`, or the subject is another than it was made for.
    """
    device = device_of(args)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    try:
        config = AutoConfig.from_pretrained(args.lens, revision=args.revision)
        if not isinstance(config, ConsistencyLensConfig):
            raise ValueError(
                f"lens: {args.lens!r} is a {config.model_type} model; pass the folder or Hub id of a lens"
            )
        lens = ConsistencyLensModel.from_pretrained(
            args.lens,
            base_model=args.model,
            config=config,
            revision=args.revision,
            dtype=dtype,
            verify_base=verify_base,
        )
        lens.subject  # noqa: B018 - loaded here, so that a missing one is found before the long work
    except OSError as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"lens: cannot load {args.lens!r}; pass the folder or Hub id of a lens ({cause})") from error
    return lens.to(device)  # type: ignore[arg-type]


def device_of(args: LensArguments) -> torch.device:
    """The device that is asked for, or a GPU if there is one.

    Raises:
        ValueError: if there is no such device.
    """
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device: got {name!r}, which is not to be had here; try cpu") from error


def source_arguments(args: SavedLensArguments, lens: ConsistencyLensModel) -> SourceArguments:
    """Where the activations come from: what the arguments say, over what the lens's training had.

    Raises:
        ValueError: if the cache or the text of the training is not to be found.
    """
    recorded = SourceArguments.recorded(recipe_of(lens))
    changes: dict[str, Any] = {}
    fraction = validation_fraction(args, lens)
    if fraction is not None:
        changes["validation_fraction"] = fraction
    if args.activations is not None:
        changes |= {"activations": args.activations, "activations_revision": args.activations_revision}
    elif recorded.activations == CACHE:
        # of the training there is only the cache left to open, which needs no text
        changes["activations"] = str(cache_of_training(args, lens))
    elif recorded.is_streamed:
        changes["activations_revision"] = trained_on(lens)["streamed_from"]["commit"]
    if changes.get("activations", recorded.activations) != ON_THE_FLY:
        changes["dataset"] = None
    elif not recorded.reads_text:
        raise ValueError(
            f"activations: the lens was trained on {recorded.activations!r}, not on a text to read on the fly; pass a "
            "cache"
        )
    return replace(recorded, **changes)


def trained_on(lens: ConsistencyLensModel) -> dict[str, Any]:
    """The provenance of the activations that a lens was trained on; empty where there is none."""
    return (lens.provenance or {}).get("cache", {})


def data_folders(args: SavedLensArguments, lens: ConsistencyLensModel) -> list[Path]:
    """Where the training may have kept its corpus and cache."""
    recorded = recipe_of(lens).get("cache_dir")
    own = [Path(args.lens) / "data"] if Path(args.lens).is_dir() else []
    return [*own, *([Path(recorded)] if recorded else [])]


def cache_of_training(args: SavedLensArguments, lens: ConsistencyLensModel) -> Path:
    """The cache that the training has left, or the folder with those of its splits.

    Raises:
        ValueError: if it is not to be found.
    """
    split = trained_on(lens).get("dataset_split")
    whole = [cache_folder(folder, lens.config.layer) for folder in data_folders(args, lens)]
    parts = [cache_folder(folder, lens.config.layer, "train").parent for folder in data_folders(args, lens)]
    places = whole if split is None else parts
    path = next((place for place in places if place.is_dir()), None)
    if path is None:
        raise ValueError(
            f"activations: no cache at {' or '.join(repr(str(place)) for place in places) or 'a known place'}; pass "
            "--activations with the folder of one, or on_the_fly"
        )
    return path


def open_held_out(args: SavedLensArguments, source: SourceArguments, lens: ConsistencyLensModel) -> SplitRows:
    """The rows that the lens is measured on, checked against it; nothing is being loaded any more.

    Raises:
        ValueError: if they are not to be found, have another subject, layer or width (with both values), or if rows
            of the training may be among them.
    """
    provenance, training = lens.provenance or {}, trained_on(lens)
    is_own = is_known(lens, lens.subject.model, is_at_its_commit(args, lens))
    reader = Reader(
        lens.subject,
        lens.require_tokenizer(),
        lens.config.base_model_name_or_path,
        lens.config.base_model_revision,
        # as the training had them; another model has to show that the rows are its own
        known_hash=training.get("weights_hash") if is_own else None,
    )
    folder = next((place for place in data_folders(args, lens) if place.is_dir()), output_folder_of_data(args))
    rows = open_rows(source, reader, folder, seed=provenance.get("seed", training.get("seed", 0)))
    if args.activations is None and rows.provenance.get("dataset_hash") != training.get("dataset_hash"):
        raise ValueError(
            f"activations: what lies at {source.activations!r} now is of another text than the lens was trained on; "
            "pass --activations"
        )
    if rows.fraction is not None and provenance.get("held_out_fraction", rows.fraction) is None:
        raise ValueError(
            "activations: the dataset of the training was split already, so what was held out of unsplit ones is not "
            "known; pass a folder with train and validation"
        )
    rows.close()  # of what was trained on, no more is read than is in memory by now
    return rows


def output_folder_of_data(args: SavedLensArguments) -> Path:
    """Where documents are kept that the subject has to write anew."""
    return Path(args.output_dir or args.lens) / "data"


def validation_fraction(args: SavedLensArguments, lens: ConsistencyLensModel) -> float | None:
    """The share of the documents that the training held out: by their hash, so that these are the same documents.

    Returns:
        None where the dataset of the training was split already.

    Raises:
        ValueError: if neither the arguments nor the lens's provenance know it, or if a larger share is asked for than
            was held out: the rest was trained on.
    """
    provenance, asked = lens.provenance or {}, args.validation_fraction
    recorded = provenance.get("held_out_fraction", recipe_of(lens).get("validation_fraction"))
    if "held_out_fraction" in provenance and recorded is None and asked is not None:
        raise ValueError(
            f"validation_fraction: got {asked}, but the dataset of the training was split already; leave it out"
        )
    if recorded is not None and asked is not None and asked > recorded:
        raise ValueError(
            f"validation_fraction: the training held out {recorded} of the documents, got {asked}; the others were "
            "trained on, so leave it out or pass less"
        )
    if recorded is None and asked is None and "held_out_fraction" not in provenance:
        raise ValueError(
            f"validation_fraction: the lens {args.lens!r} has no record of its training; pass the share of documents "
            "that was held out, e.g. --validation_fraction 0.1"
        )
    return recorded if asked is None else asked


def recipe_of(lens: ConsistencyLensModel) -> dict[str, Any]:
    """What the lens was trained from, as its provenance has it; empty where there is none."""
    return (lens.provenance or {}).get("recipe", {})


def collator_for(lens: ConsistencyLensModel) -> ActivationCollator:
    """The collator for a lens's tokenizer and T."""
    tokenizer = lens.require_tokenizer()
    pad_token_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    return ActivationCollator(pad_token_id, lens.config.num_text_tokens, tokenizer.bos_token_id)
