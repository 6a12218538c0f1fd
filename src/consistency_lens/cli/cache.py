"""`consistency-lens cache`, and the whole of `examples/cache_activations.py`: a subject's activations on a corpus."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from ..data.activation_cache import ActivationCache

SPLITS = ("train", "validation")
VALIDATION_FRACTION = 0.1


@dataclass
class CacheArguments:
    """Which subject is read on which tokens, and where its activations go."""

    model: str = field(default="", metadata={"help": "The subject: Hub id or folder of a causal LM."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the subject on the Hub."})
    dataset: str = field(
        default="",
        metadata={"help": "Folder that `consistency-lens tokenize` made, or a text file with lines of <|endoftext|>."},
    )
    split: list[str] = field(
        default_factory=lambda: list(SPLITS), metadata={"help": "train, validation or both: a cache of each."}
    )
    layer: list[int] | None = field(
        default=None, metadata={"help": "Blocks whose output is read, 0-based, a cache of each; default: middle."}
    )
    output_dir: str = field(
        default="data/activations",
        metadata={"help": "Root: caches lie in <output_dir>/<dataset>/<model>/layer_<k>/<split>."},
    )

    dtype: str = field(default="float32", metadata={"help": "Precision of the subject: float32, bfloat16 or float16."})
    quantization: str | None = field(default=None, metadata={"help": "8bit or 4bit weights, by bitsandbytes."})
    attention: str = field(
        default="auto",
        metadata={"help": "As transformers names it; auto: FlashAttention 2 where it runs, else sdpa, else eager."},
    )
    device: str | None = field(
        default=None, metadata={"help": "Such as cpu or cuda:1; default: a GPU for each process if there are any."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "auto: spread a subject that is larger than a device. Then one process."}
    )
    blocks: str | None = field(default=None, metadata={"help": "Path of the blocks in an unknown architecture."})

    positions_per_sequence: int = field(default=8, metadata={"help": "K, activations cached from one sequence."})
    min_position: int = field(default=8, metadata={"help": "First position that may be read."})
    cache_dtype: str = field(default="float16", metadata={"help": "Of the stored activations: float16 or float32."})
    max_norm: float | None = field(
        default=None, metadata={"help": "Drop and count rows of more than this many times the median norm, e.g. 10."}
    )
    batch_size: int = field(default=32, metadata={"help": "Longest sequences in one pass; of shorter ones go more."})
    rows_per_shard: int = field(default=8192, metadata={"help": "About how many rows a file holds."})
    seed: int = field(default=0, metadata={"help": "Of the positions."})

    max_length: int | None = field(
        default=None, metadata={"help": "Text file: tokens of a document, the rest is cut; default: all."}
    )
    validation_fraction: float | None = field(
        default=None, metadata={"help": f"Text file: share of the documents held out; default: {VALIDATION_FRACTION}."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        examples = {"model": "gpt2", "dataset": "data/corpus"}
        for name, example in examples.items():
            if not getattr(self, name):
                raise ValueError(f"{name}: got none; pass it, e.g. --{name} {example}")
        if not Path(self.dataset).exists():
            raise ValueError(
                f"dataset: nothing at {self.dataset!r}; pass a text file, or a folder that consistency-lens tokenize "
                "made (of a data set on the Hub, too)"
            )
        # a config file may name one without brackets
        self.split = [self.split] if isinstance(self.split, str) else self.split
        self.layer = [self.layer] if isinstance(self.layer, int) else self.layer
        unknown = [split for split in self.split if split not in SPLITS]
        if unknown:
            raise ValueError(f"split must be {' or '.join(SPLITS)} or both, got {unknown[0]!r}")
        self._check_text_arguments()

    def _check_text_arguments(self) -> None:
        """Checks what is said of a text file, and that it is one."""
        for name in ("max_length", "validation_fraction"):
            if Path(self.dataset).is_dir() and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, but {self.dataset!r} is tokenised and split already; "
                    "leave it out, or tokenise again"
                )
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}; try 0.1")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}; 512 is a good start")


class Source(NamedTuple):
    """The tokens that are read."""

    name: str
    revision: str | None
    facts: dict[str, Any]
    """How its text was made into sequences."""
    splits: "dict[str, Dataset]"


class CachedSplit(NamedTuple):
    """A cache that is there now."""

    cache: "ActivationCache"
    is_new: bool
    """False if it was here already."""


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the caches; prints what each holds and where it lies. Returns the exit code."""
    from .command import run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        (args,) = parse_arguments((CacheArguments,), argv, "cache")
        state = process_state(args)
        caches = cache_activations(args, state)
        if state.is_main_process:
            for cached in caches:
                console.print(summary(cached), markup=False, highlight=False, soft_wrap=True)
        state.destroy_process_group()

    return run_command(work)


def process_state(args: CacheArguments) -> "PartialState":
    """The processes that share the work: those of `accelerate launch` or `torchrun`, or this one alone."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    # Without an accelerator the ranks find each other only if they are told so. A rank that has done its shards waits
    # for the slowest, whatever that takes.
    return PartialState(cpu=args.device == "cpu" or not torch.accelerator.is_available(), timeout=timedelta(days=30))


def cache_activations(args: CacheArguments, state: "PartialState") -> list[CachedSplit]:
    """Builds, or finishes, one cache for each split and layer; every process of `state` calls it.

    Raises:
        ValueError: for a user's mistake.
        CacheWriteError: if a file cannot be written, as when the disk is full.
    """
    from ..data.activation_cache import PROVENANCE_FILE, cache_path
    from ..data.cache_building import build_activation_caches, check_settings
    from ..data.subject_loading import check_layers, check_loading, load_model, load_tokenizer, pinned_revision
    from ..residual_stream import ResidualStream

    check_settings(
        args.positions_per_sequence, args.min_position, args.cache_dtype, args.max_norm, args.batch_size,
        args.rows_per_shard,
    )  # fmt: skip
    device = device_of(args, state)
    # all that can be wrong without the weights comes before they are loaded
    check_loading(args.dtype, args.quantization, device, args.device_map, args.attention)
    revision = pinned_revision(args.model, args.revision)
    tokenizer = load_tokenizer(args.model, revision)
    check_layers(args.model, revision, args.layer or [])
    source = read_source(args, tokenizer)
    model = load_model(args.model, revision, args.dtype, args.quantization, args.attention, device, args.device_map)
    stream = ResidualStream(model, blocks=args.blocks)
    layers = [stream.num_layers // 2] if args.layer is None else args.layer
    caches: list[CachedSplit] = []
    for split, corpus in source.splits.items():
        paths = {layer: cache_path(args.output_dir, source.name, args.model, layer, split) for layer in layers}
        here = {layer for layer, path in paths.items() if (path / PROVENANCE_FILE).is_file()}
        built = build_activation_caches(
            stream,
            corpus,
            paths,
            tokenizer=tokenizer,
            subject_name=args.model,
            subject_revision=revision,
            subject_hash=caches[0].cache.provenance["weights_hash"] if caches else None,
            dataset_name=source.name,
            dataset_revision=source.revision,
            dataset_split=split,
            corpus_facts=source.facts,
            arguments=asdict(args),
            positions_per_sequence=args.positions_per_sequence,
            min_position=args.min_position,
            dtype=args.cache_dtype,
            max_norm=args.max_norm,
            batch_size=args.batch_size,
            rows_per_shard=args.rows_per_shard,
            seed=args.seed,
            progress=not args.disable_tqdm,
            state=state,
        )
        caches += [CachedSplit(cache, layer not in here) for layer, cache in built.items()]
    return caches


def device_of(args: CacheArguments, state: "PartialState") -> str | None:
    """Where this process has its subject; None where a device map says.

    Raises:
        ValueError: if several processes would share a device or a device map.
    """
    if state.num_processes > 1 and (args.device_map is not None or args.device not in (None, "cpu")):
        name = "device" if args.device_map is None else "device_map"
        raise ValueError(
            f"{name}: got {getattr(args, name)!r} with {state.num_processes} processes; leave it out, so that each "
            "has its own GPU, or start one process"
        )
    return args.device or (None if args.device_map is not None else str(state.device))


def read_source(args: CacheArguments, tokenizer: "PreTrainedTokenizerBase") -> Source:
    """The splits that are asked for, of a corpus folder or a text file.

    Raises:
        ValueError: if the folder is no corpus, or one of another tokenizer, or the text cannot be read or split.
    """
    from ..data.corpus import read_documents, split_by_document, tokenize_documents
    from ..data.tokenized_corpus import corpus_origin, open_corpus

    if Path(args.dataset).is_dir():
        origin = corpus_origin(args.dataset, tokenizer, args.model)
        splits = {split: open_corpus(args.dataset, split) for split in args.split}
        return Source(origin.name, origin.revision, origin.facts, splits)
    corpus = tokenize_documents(read_documents(args.dataset), tokenizer, args.max_length)
    fraction = args.validation_fraction or VALIDATION_FRACTION
    parts = dict(zip(SPLITS, split_by_document(corpus, fraction), strict=True))
    facts = {
        "max_length": args.max_length, "long_documents": "cut", "packing": False, "validation_fraction": fraction,
    }  # fmt: skip
    return Source(args.dataset, None, facts, {split: parts[split] for split in args.split})


def summary(cached: CachedSplit) -> str:
    """What a cache holds, in one line, and what to do next."""
    from .describe import readable_size

    provenance, path = cached.cache.provenance, cached.cache.path
    counts = f"{provenance['rows']:,} rows of {provenance['sequences']['kept']:,} sequences"
    skipped = provenance["sequences"]["skipped_too_short"]
    if skipped:
        counts += f", {skipped:,} skipped as too short"
    if "norm_filter" in provenance:
        counts += f", {provenance['norm_filter']['dropped_rows']:,} rows dropped by their norm"
    counts += f", {readable_size(sum(shard['bytes'] for shard in provenance['shards']))}"
    state = "" if cached.is_new else "here already; nothing was done; "
    return (
        f"layer {provenance['layer']}, {provenance['dataset_split']}: {state}{counts}; look at it with: "
        f"consistency-lens describe --cache {shlex.quote(str(path))}"
    )
