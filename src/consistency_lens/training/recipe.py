"""From a recipe to a lens: subject, corpus, cache, training, evaluation. `cli.train` and the example call `run`."""

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .. import __version__
from ..atomic_write import write_json
from ..data.activation_cache import ActivationCache, ActivationRows
from ..data.cache_building import build_activation_cache, weights_hash
from ..data.collator import ActivationCollator
from ..data.corpus import read_documents, tokenize_documents
from ..data.generation import sample_documents
from ..evaluation.evaluator import EvaluationArguments, Evaluator, write_metrics
from ..evaluation.samples import Sample, collect_samples, write_samples
from ..hub.cards import write_lens_card
from ..modeling_consistency_lens import ConsistencyLensModel
from ..residual_stream import ResidualStream
from ..subject import Subject
from .arguments import ConsistencyLensTrainingArguments
from .trainer import ConsistencyLensTrainer

logger = logging.getLogger(__name__)


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
        now = time.perf_counter()
        self.laps[name], self._since = now - self._since, now


def load_subject_and_tokenizer(args: RecipeArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen subject and its tokenizer, in the evaluation mode that both sides of the lens are measured in."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
        dtype = getattr(torch, args.dtype)
        model = AutoModelForCausalLM.from_pretrained(args.model, revision=args.revision, dtype=dtype)
    except OSError as error:
        raise ValueError(f"model: cannot load {args.model!r}; pass a Hub id or a folder with a causal LM") from error
    return model.eval().requires_grad_(False), tokenizer


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
        subject_revision=args.revision,
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
        revision=args.revision,
    )


def run(args: RecipeArguments, training_args: ConsistencyLensTrainingArguments) -> RunResult:
    """Trains and evaluates one lens; every artifact lies under `training_args.output_dir`.

    Raises:
        ValueError: for a user's mistake, before any long work starts.
    """
    clock = Clock()
    set_seed(training_args.seed)
    output_dir = Path(str(training_args.output_dir))
    model, tokenizer = load_subject_and_tokenizer(args)
    model.to(training_args.device)  # type: ignore[arg-type]
    layer = ResidualStream(model).num_layers // 2 if args.layer is None else args.layer
    subject = Subject(model, layer)
    # made before the cache, so that every mistake in its settings is found before the long work
    lens = make_lens(args, model, tokenizer, layer)

    with training_args.main_process_first(desc="activation cache"):
        folder = Path(args.cache_dir) if args.cache_dir else output_dir / "data"
        cache = make_cache(args, subject, tokenizer, folder, training_args.seed)
    clock.lap("corpus_and_cache")
    train, validation = cache.split(args.validation_fraction)
    lens.set_statistics(train.mean, train.rms)
    lens.provenance = {
        "consistency_lens": __version__,
        "recipe": asdict(args),
        "cache": {key: value for key, value in cache.provenance.items() if key not in ("mean", "shards")},
        "train_rows": len(train),
        "validation_rows": len(validation),
    }
    pad_token_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    collator = ActivationCollator(pad_token_id, args.num_text_tokens, tokenizer.bos_token_id)
    pair_seed = training_args.seed if training_args.delta_residual != "none" else None
    validation_rows = ActivationRows(validation)
    trainer = ConsistencyLensTrainer(
        model=lens,
        args=training_args,
        train_dataset=ActivationRows(train, pair_seed),
        eval_dataset=validation_rows,
        data_collator=collator,
    )
    resume = training_args.resume_from_checkpoint
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(output_dir) if resume in ("True", "true", True) else resume
    )
    lens.eval()
    trainer.save_model()
    clock.lap("training")

    evaluation = EvaluationArguments(
        rows=args.eval_rows, seed=training_args.seed, disable_tqdm=bool(training_args.disable_tqdm)
    )
    evaluator = Evaluator(lens, validation_rows, collator, evaluation)
    metrics = evaluator() if trainer.is_world_process_zero() else {}
    samples = collect_samples(lens, validation_rows, collator, count=args.num_samples, seed=training_args.seed)
    if trainer.is_world_process_zero():
        resolved = {"recipe": asdict(args), "training": training_args.to_dict()}
        write_metrics(output_dir / "metrics.json", metrics, resolved)
        write_samples(output_dir / "samples.jsonl", samples)
        clock.lap("evaluation")
        write_json(output_dir / "log_history.json", trainer.state.log_history)
        write_json(output_dir / "run.json", {"seconds": sum(clock.laps.values()), "laps": clock.laps, **resolved})
        write_lens_card(output_dir, lens, metrics, samples)
    return RunResult(lens, output_dir, metrics, samples)
