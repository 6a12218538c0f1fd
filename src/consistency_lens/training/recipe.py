"""From a recipe to a lens: subject, corpus, cache, training, evaluation. `cli.train` and the example call `run`."""

import logging
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .. import __version__
from ..atomic_write import write_json
from ..data.activation_cache import ActivationCache, ActivationRows
from ..data.cache_building import build_activation_cache, weights_hash
from ..data.collator import ActivationCollator
from ..data.corpus import read_documents, tokenize_documents
from ..data.generation import sample_documents
from ..evaluation.arguments import EvaluationArguments
from ..evaluation.evaluator import Evaluator, write_metrics
from ..evaluation.samples import Sample, collect_samples, write_samples
from ..hub.cards import write_lens_card
from ..modeling_consistency_lens import ConsistencyLensModel
from ..residual_stream import ResidualStream
from ..subject import Subject
from .arguments import ConsistencyLensTrainingArguments
from .trainer import ConsistencyLensTrainer

logger = logging.getLogger(__name__)


DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class RecipeArguments:
    """What is read, on which text, and how the lens is built."""

    model: str = field(default="", metadata={"help": "The subject: Hub id or folder of a causal LM."})
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the subject on the Hub."})
    dtype: str = field(default="float32", metadata={"help": "Precision of the subject's weights."})
    layer: int | None = field(default=None, metadata={"help": "Block whose output is read, 0-based; default: middle."})
    num_text_tokens: int = field(default=8, metadata={"help": "T, tokens of an explanation."})
    clones: str = field(default="full", metadata={"help": "Training of decoder and encoder: full, lora or frozen."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters with clones=lora."})
    lora_targets: str = field(
        default="all-linear", metadata={"help": "Modules that get adapters, as PEFT names them."}
    )
    decoder_prompt: str = field(default="<embed>", metadata={"help": "Prompt with the slot <embed>."})
    encoder_prompt: str = field(default="<text>", metadata={"help": "Prompt with the slot <text>."})
    injection_layers: int = field(default=0, metadata={"help": "Inject A into the slot's input of blocks 1..n too."})
    output_layer: int | None = field(default=None, metadata={"help": "Blocks of the encoder; default layer + 1."})
    blocks: str | None = field(default=None, metadata={"help": "Path of the blocks in an unknown architecture."})
    final_norm: str | None = field(default=None, metadata={"help": "Path of the final norm, likewise."})

    text_file: str | None = field(
        default=None,
        metadata={"help": "Documents divided by lines of <|endoftext|>; unset: the subject writes its own."},
    )
    num_documents: int = field(default=4000, metadata={"help": "Documents to sample where there is no text file."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a document; the rest is cut."})
    positions_per_sequence: int = field(default=8, metadata={"help": "K, activations cached from one document."})
    min_position: int = field(default=8, metadata={"help": "First position that may be read."})
    cache_dtype: str = field(default="float32", metadata={"help": "float16 or float32."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Corpus and activations; default <output_dir>/data."}
    )
    validation_fraction: float = field(default=0.1, metadata={"help": "Share of the documents held out."})

    eval_rows: int = field(default=1024, metadata={"help": "Held-out activations in the final evaluation."})
    num_samples: int = field(default=12, metadata={"help": "Sample rows shown and written at the end."})

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: got none; pass the subject's Hub id or folder, e.g. --model gpt2")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.cache_dtype not in ("float16", "float32"):
            raise ValueError(f"cache_dtype must be float16 or float32, got {self.cache_dtype!r}")
        for name in ("positions_per_sequence", "num_documents", "eval_rows", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}; try 0.1")
        if self.num_text_tokens < 1:
            raise ValueError(f"num_text_tokens must be at least 1, got {self.num_text_tokens}; 8 is a good start")
        if self.min_position < self.num_text_tokens:
            # every context then holds a whole tail of T tokens after BOS
            raise ValueError(
                f"min_position must be at least num_text_tokens, got {self.min_position} < {self.num_text_tokens}; "
                "raise it"
            )
        if self.max_length < self.min_position + 2:
            raise ValueError(
                f"max_length {self.max_length} leaves no position after min_position {self.min_position}; raise it"
            )


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: the lens, where it lies, its held-out figures and sample rows."""

    lens: ConsistencyLensModel
    output_dir: Path
    metrics: dict[str, Any]
    samples: list[Sample]


class Clock:
    """Wall seconds of each part of a run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Books the time since the last lap under `name`."""
        now = time.perf_counter()
        self.laps[name], self._since = now - self._since, now


def load_subject_and_tokenizer(args: RecipeArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen subject and its tokenizer, in the evaluation mode that both sides of the lens are measured in.

    Raises:
        ValueError: if they cannot be loaded, or `max_length` is beyond the subject's context.
    """
    revision = pinned_revision(args)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(args.model, revision=revision, dtype=getattr(torch, args.dtype))
    except (OSError, ValueError) as error:
        raise not_loaded(args, error) from error
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and args.max_length > context:
        raise ValueError(f"max_length {args.max_length} is beyond the subject's context of {context}; lower it")
    return model.eval().requires_grad_(False), tokenizer


def pinned_revision(args: RecipeArguments) -> str | None:
    """The commit that a Hub subject is at, so that the artifact names it for good; None for a local folder."""
    if Path(args.model).is_dir():
        return None
    try:
        config_file = cached_file(args.model, "config.json", revision=args.revision)
    except (OSError, ValueError) as error:
        raise not_loaded(args, error) from error
    return extract_commit_hash(config_file, None) or args.revision


def not_loaded(args: RecipeArguments, error: Exception) -> ValueError:
    """The one-line error for a subject that cannot be loaded, with its cause."""
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(f"model: cannot load {args.model!r}; pass a Hub id or a folder with a causal LM ({cause})")


def make_corpus(args: RecipeArguments, model: PreTrainedModel, tokenizer: Any, folder: Path, seed: int) -> Dataset:
    """The documents to read: from a text file, or sampled from the subject; kept under `folder`."""
    if args.text_file is not None:
        return tokenize_documents(read_documents(args.text_file), tokenizer, args.max_length)
    settings = f"n{args.num_documents}-length{args.max_length}-seed{seed}-{weights_hash(model)[:12]}"
    path = folder / f"corpus-{settings}"
    if not path.is_dir():
        corpus = sample_documents(model, tokenizer, args.num_documents, args.max_length, seed=seed, batch_size=256)
        partial = path.with_name(f".{path.name}.partial")
        corpus.save_to_disk(partial)
        partial.rename(path)
    return load_from_disk(path)


def make_cache(args: RecipeArguments, subject: Subject, tokenizer: Any, folder: Path, seed: int) -> ActivationCache:
    """Corpus and activation cache; what already lies there with the same settings is used again."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(args, subject.model, tokenizer, folder, seed)
    return build_activation_cache(
        subject,
        corpus,
        folder / f"activations-layer{subject.layer}",
        tokenizer=tokenizer,
        subject_name=args.model,
        subject_revision=pinned_revision(args),
        dataset_name=args.text_file or f"samples of {args.model}",
        positions_per_sequence=args.positions_per_sequence,
        min_position=args.min_position,
        dtype=args.cache_dtype,
        seed=seed,
    )


def make_lens(args: RecipeArguments, model: PreTrainedModel, tokenizer: Any, layer: int) -> ConsistencyLensModel:
    """A new lens for the subject; the statistics of its training rows come later."""
    lora = {"r": args.lora_rank, "lora_alpha": 2 * args.lora_rank, "target_modules": args.lora_targets}
    return ConsistencyLensModel.from_subject(
        model,
        tokenizer,
        layer,
        num_text_tokens=args.num_text_tokens,
        training=args.clones,
        lora=lora if args.clones == "lora" else None,
        decoder_prompt=args.decoder_prompt,
        encoder_prompt=args.encoder_prompt,
        injection_layers=args.injection_layers,
        output_layer=args.output_layer,
        revision=pinned_revision(args),
        blocks=args.blocks,
        final_norm=args.final_norm,
    )


def run(args: RecipeArguments, training_args: ConsistencyLensTrainingArguments) -> RunResult:
    """Trains and evaluates one lens; every artifact lies under `training_args.output_dir`.

    Raises:
        ValueError: for a user's mistake, before any long work starts.
    """
    clock = Clock()
    set_seed(training_args.seed)
    output_dir = Path(str(training_args.output_dir))
    resume = checkpoint_to_resume(training_args.resume_from_checkpoint, output_dir)
    training_args.check_stages()
    model, tokenizer = load_subject_and_tokenizer(args)
    model.to(training_args.device)  # type: ignore[arg-type]
    layer = args.layer
    if layer is None:
        layer = ResidualStream(model, blocks=args.blocks, final_norm=args.final_norm).num_layers // 2
    # made before the cache, so that every mistake in its settings is found before the long work
    lens = make_lens(args, model, tokenizer, layer)

    with training_args.main_process_first(desc="activation cache"):
        folder = Path(args.cache_dir) if args.cache_dir else output_dir / "data"
        cache = make_cache(args, lens.subject, tokenizer, folder, training_args.seed)
    clock.lap("corpus_and_cache")
    trainer = make_trainer(args, training_args, lens, cache)
    trainer.train(resume_from_checkpoint=resume)
    lens.eval()
    trainer.save_model()
    clock.lap("training")
    metrics: dict[str, Any] = {}
    samples: list[Sample] = []
    if trainer.is_world_process_zero():
        metrics, samples = evaluate_and_write(args, trainer, clock, output_dir)
    return RunResult(lens, output_dir, metrics, samples)


def make_trainer(
    args: RecipeArguments,
    training_args: ConsistencyLensTrainingArguments,
    lens: ConsistencyLensModel,
    cache: ActivationCache,
) -> ConsistencyLensTrainer:
    """The trainer over both parts of a cache; the lens gets its statistics and its provenance."""
    train, validation = cache.split(args.validation_fraction)
    lens.set_statistics(train.mean, train.rms)
    lens.provenance = {
        "consistency_lens": __version__,
        "recipe": asdict(args),
        "cache": {key: value for key, value in cache.provenance.items() if key not in ("mean", "shards")},
        "train_rows": len(train),
        "validation_rows": len(validation),
    }
    tokenizer = lens.require_tokenizer()
    pad_token_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    pair_seed = training_args.seed if training_args.delta_residual != "none" else None
    return ConsistencyLensTrainer(
        model=lens,
        args=training_args,
        train_dataset=ActivationRows(train, pair_seed),
        eval_dataset=ActivationRows(validation, pair_seed),
        data_collator=ActivationCollator(pad_token_id, args.num_text_tokens, tokenizer.bos_token_id),
    )


def checkpoint_to_resume(wanted: str | None, output_dir: Path) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` means; "true" is the last one of the run.

    Raises:
        ValueError: if there is none.
    """
    if wanted is None:
        return None
    if str(wanted).lower() == "true":
        found = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
        if found is None:
            raise ValueError(
                f"resume_from_checkpoint: no checkpoint in {str(output_dir)!r}; leave it out to start anew"
            )
        return found
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint: {wanted!r} is no checkpoint folder; pass one named checkpoint-<step>"
        )
    return wanted


def evaluate_and_write(
    args: RecipeArguments, trainer: ConsistencyLensTrainer, clock: Clock, output_dir: Path
) -> tuple[dict[str, Any], list[Sample]]:
    """Measures the lens on held-out rows and writes figures, samples, curves, arguments and card."""
    training_args = trainer.args
    rows: Any = trainer.eval_dataset
    collator: Any = trainer.data_collator
    quiet = bool(training_args.disable_tqdm)
    evaluation = EvaluationArguments(rows=args.eval_rows, seed=training_args.seed, disable_tqdm=quiet)
    metrics = Evaluator(trainer.lens, rows, collator, evaluation)()
    samples = collect_samples(trainer.lens, rows, collator, count=args.num_samples, seed=training_args.seed)
    clock.lap("evaluation")
    resolved = {"recipe": asdict(args), "training": training_args.to_dict()}
    machine = {"cpu_cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": str(training_args.device)}
    seconds = {"seconds": sum(clock.laps.values()), "laps": clock.laps, "machine": machine}
    write_metrics(output_dir / "metrics.json", metrics, resolved)
    write_samples(output_dir / "samples.jsonl", samples)
    write_json(output_dir / "run.json", {**seconds, **resolved})
    write_json(output_dir / "log_history.json", [without_nan(entry) for entry in trainer.state.log_history])
    write_lens_card(output_dir, trainer.lens, metrics, samples)
    return metrics, samples


def without_nan(entry: dict[str, Any]) -> dict[str, Any]:
    """A log entry with None for what is not finite, such as the gradient norm of a skipped step."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
