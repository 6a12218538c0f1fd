"""A recipe as steps: tokenize, cache, train, eval. Which of them it has, what each is told, and what is done."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .step_results import check_cache, check_same, is_evaluated, is_trained

if TYPE_CHECKING:
    from ..training.recipe_arguments import RecipeArguments

STEPS = ("tokenize", "cache", "train", "eval")
RUNS, HERE, NOT_NEEDED = "to run", "here already", "not needed"
# Arguments that `cache` and a recipe both have, but of other things.
NOT_OF_CACHE = {"dataset", "output_dir", "max_length", "validation_fraction", "layer"}
# Training arguments that want the devices or the packages of the machine that trains.
OF_DEVICES = {"tf32", "deepspeed", "fsdp", "fsdp_config"}
OF_DEVICES |= {"torch_compile", "torch_compile_backend", "torch_compile_mode"}


@dataclass(frozen=True)
class Step:
    """One command of a pipeline."""

    name: str
    settings: dict[str, Any]
    """Its arguments, all that differ from the defaults."""
    result: Path
    """The folder of what it makes."""
    state: str = RUNS
    """One of `RUNS`, `HERE`, `NOT_NEEDED`."""


@dataclass(frozen=True)
class Recipe:
    """A recipe with the flags on top of it."""

    given: dict[str, Any]
    """name -> value of the arguments of `train` that are given."""
    arguments: "RecipeArguments"
    sections: dict[str, dict[str, Any]]
    """command -> what the recipe says to it alone."""

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.given["output_dir"])

    @property
    def data(self) -> Path:
        """The folder of corpus and activations."""
        return Path(self.arguments.cache_dir) if self.arguments.cache_dir else self.output_dir / "data"


def read_recipe(argv: Sequence[str], config: Mapping[str, Any], beside: Collection[str] = ()) -> Recipe:
    """A recipe, from what its file holds and flags of `train`, which win.

    Args:
        beside: other flags that there are, which an unknown one may be near to.

    Raises:
        ValueError: for an unknown key or flag, a value of another kind, or one that training would not take.
    """
    from ..data.tokenization import TokenizationArguments
    from ..evaluation.saved_lens import SavedLensArguments, WholeEvaluationArguments
    from ..training.arguments import ConsistencyLensTrainingArguments
    from ..training.recipe_arguments import RecipeArguments
    from .cache import CacheArguments
    from .parser import RECIPE_SECTIONS, check_keys, known_names, parse_given, unknown_flag

    dataclasses = (RecipeArguments, ConsistencyLensTrainingArguments)
    top = {key: value for key, value in config.items() if key not in RECIPE_SECTIONS}
    check_keys("the recipe", top, known_names(dataclasses))
    given, rest = parse_given(dataclasses, argv, top)
    if rest:
        raise ValueError(unknown_flag(rest, known_names(dataclasses) | set(beside)))
    if not given.get("output_dir"):
        raise ValueError("output_dir: got none; pass the folder of the run, e.g. --output_dir outputs/mine")
    if given.get("hub_token"):
        raise ValueError(
            "hub_token: settings of steps are kept in files; log in with `hf auth login`, or set HF_TOKEN, instead"
        )
    names = known_names((RecipeArguments,))
    # command -> its arguments, and those that the recipe itself has, or the pipeline
    commands: dict[str, tuple[tuple[Any, ...], set[str]]] = {
        "tokenize": ((TokenizationArguments,), {"model", "revision", "output_dir"}),
        "cache": ((CacheArguments,), names | {"split", "output_dir", "seed"}),
        "eval": ((SavedLensArguments, WholeEvaluationArguments), {"lens"}),
    }
    sections = {}
    for name, (classes, elsewhere) in commands.items():
        section = section_of(config, name)
        check_keys(f"the section {name!r} of the recipe", section, known_names(classes) - elsewhere)
        sections[name] = parse_given(classes, [], section)[0] if section else {}
    arguments = RecipeArguments(**{name: value for name, value in given.items() if name in names})
    # only looked at, so that a mistake in them does not show after hours of caching
    left_out = names.union(OF_DEVICES)
    training = {name: value for name, value in given.items() if name not in left_out} | {"use_cpu": True}
    ConsistencyLensTrainingArguments(**training).check_stages()
    return Recipe(given, arguments, sections)


def section_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a recipe says to one command alone; empty where it says nothing.

    Raises:
        ValueError: if that is no mapping.
    """
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"--config: {name} must hold 'key: value' lines, got {section!r}")
    return section


def plan(recipe: Recipe, resume: bool = False, force: str | None = None) -> list[Step]:
    """The steps of a recipe in order. What is there already is not made again, nor what only that would need.

    Args:
        resume: training goes on from its last checkpoint, if there is one.
        force: the first step that is done again, with all after it, though they are there.

    Raises:
        ValueError: if what lies where a result goes was made with other settings or is an unfinished training, or the
            data set, the tokenizer or the layer are not to be found.
    """
    again = () if force is None else STEPS[STEPS.index(force) :]
    tokenize = tokenize_step(recipe, "tokenize" in again)
    corpus = tokenize.result if tokenize else None
    cache = cache_step(recipe, corpus, "cache" in again)
    train = train_step(recipe, corpus, cache, resume, "train" in again)
    evaluate = eval_step(recipe, train, "eval" in again)
    # what nothing that is still to run reads is not made: a corpus may be gone once it is cached
    if cache and train.state == evaluate.state == HERE and cache.state == RUNS:
        cache = replace(cache, state=NOT_NEEDED)
    readers = [cache] if cache else [train, evaluate]
    if tokenize and tokenize.state == RUNS and all(reader.state != RUNS for reader in readers):
        tokenize = replace(tokenize, state=NOT_NEEDED)
    if force is not None and not any(step and step.name == force for step in (tokenize, cache, train, evaluate)):
        raise ValueError(f"force: got {force!r}, but this recipe has no such step; pass --force train")
    return [step for step in (tokenize, cache, train, evaluate) if step]


def tokenize_step(recipe: Recipe, again: bool) -> Step | None:
    """The corpus; None where the recipe needs none, or names one that is there."""
    from ..data.tokenized_corpus import TOKENIZATION_FILE

    arguments, section = recipe.arguments, recipe.sections["tokenize"]
    is_corpus = arguments.dataset is not None and (Path(arguments.dataset) / TOKENIZATION_FILE).is_file()
    if not arguments.reads_text or (arguments.dataset is None and "dataset" not in section):
        if section:
            raise ValueError("tokenize: the recipe reads no text that is to be tokenised; remove the section")
        return None
    if is_corpus and "dataset" not in section:
        return None
    folder = Path(arguments.dataset) if "dataset" in section and arguments.dataset else recipe.data / "corpus"
    settings = {
        "dataset": arguments.dataset,
        "model": arguments.model,
        "revision": arguments.revision,
        "max_length": arguments.max_length,
        "validation_fraction": arguments.validation_fraction,
        "output_dir": str(folder),
    } | section
    return Step("tokenize", without_none(settings), Path(settings["output_dir"]), corpus_state(settings, again))


def corpus_state(settings: Mapping[str, Any], again: bool) -> str:
    """Whether the corpus of these settings is there.

    Raises:
        ValueError: if another one is, or tokenising would not start.
    """
    from ..data.dataset_reading import check_source
    from ..data.tokenization import (
        TokenizationArguments,
        checked_tokenizer,
        holds_corpus,
        settings_of,
        subject_context,
    )

    arguments = TokenizationArguments(**settings)
    check_is_somewhere(arguments.dataset)
    check_source(arguments.dataset, arguments.dataset_config, arguments.dataset_revision)
    tokenizer, context = checked_tokenizer(arguments), subject_context(arguments)
    if again:
        return RUNS
    folder = Path(arguments.output_dir).resolve()
    return HERE if holds_corpus(folder, settings_of(arguments, tokenizer, context)) else RUNS


def check_is_somewhere(dataset: str) -> None:
    """ValueError for a data set that is no file or folder here, and cannot be one of the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(dataset).exists():
        return
    message = f"dataset: nothing at {dataset!r}; pass a text file, a corpus folder, or the id of a data set on the Hub"
    if Path(dataset).suffix:
        raise ValueError(message)
    try:
        validate_repo_id(dataset)
    except HFValidationError as error:
        raise ValueError(message) from error


def cache_step(recipe: Recipe, corpus: Path | None, again: bool) -> Step | None:
    """The activations of both splits; None where training makes its own, or reads what is there."""
    from ..data.activation_cache import PROVENANCE_FILE, cache_path
    from ..data.sources import CACHE
    from ..data.tokenized_corpus import SPLITS
    from .cache import CacheArguments
    from .parser import known_names

    arguments, section = recipe.arguments, recipe.sections["cache"]
    if arguments.activations != CACHE or arguments.dataset is None and corpus is None:
        if section:
            raise ValueError("cache: training makes or reads the activations of this recipe; remove the section")
        return None
    shared = known_names((CacheArguments,)) & {item.name for item in fields(arguments)} - NOT_OF_CACHE
    dataset = corpus or Path(str(arguments.dataset))
    settings = {
        "dataset": str(dataset),
        "layer": [layer_of(recipe)],
        "output_dir": str(recipe.data / "activations"),
        **{name: getattr(arguments, name) for name in sorted(shared)},
        "seed": seed_of(recipe),
        **section,
    }
    name = corpus_name(recipe, dataset)
    folder = cache_path(settings["output_dir"], name, settings["model"], layer_of(recipe), SPLITS[0]).parent
    here = all((folder / split / PROVENANCE_FILE).is_file() for split in SPLITS)
    if here and not again:
        check_cache(folder / SPLITS[0], settings)
    return Step("cache", without_none(settings), folder, HERE if here and not again else RUNS)


def corpus_name(recipe: Recipe, corpus: Path) -> str:
    """What a corpus is called in its caches: the data set that it was made of."""
    from ..data.tokenized_corpus import TOKENIZATION_FILE, read_tokenization

    if (corpus / TOKENIZATION_FILE).is_file():
        return read_tokenization(corpus)["settings"]["dataset"]
    return recipe.sections["tokenize"].get("dataset") or str(recipe.arguments.dataset)


def layer_of(recipe: Recipe) -> int:
    """The layer that is read: that of the recipe, or the middle.

    Raises:
        ValueError: if the subject has no such layer, or does not say how many it has.
    """
    from transformers import AutoConfig

    from ..data.subject_loading import check_layers

    arguments = recipe.arguments
    check_layers(arguments.model, arguments.revision, [] if arguments.layer is None else [arguments.layer])
    if arguments.layer is not None:
        return arguments.layer
    config = AutoConfig.from_pretrained(arguments.model, revision=arguments.revision).get_text_config()
    if getattr(config, "num_hidden_layers", None) is None:
        raise ValueError(f"layer: the configuration of {arguments.model!r} has no number of blocks; pass --layer")
    return config.num_hidden_layers // 2


def seed_of(recipe: Recipe) -> int:
    """The seed of the run."""
    from ..training.arguments import ConsistencyLensTrainingArguments

    default = next(item.default for item in fields(ConsistencyLensTrainingArguments) if item.name == "seed")
    return recipe.given.get("seed", default)


def train_step(recipe: Recipe, corpus: Path | None, cache: Step | None, resume: bool, again: bool) -> Step:
    """The lens.

    Raises:
        ValueError: if a lens of other settings, or an unfinished training that is not to go on, lies there.
    """
    settings, folder = dict(recipe.given), recipe.output_dir
    if cache:
        settings.pop("dataset", None)
        settings |= {"activations": str(cache.result), "layer": layer_of(recipe)}
    elif corpus:
        settings["dataset"] = str(corpus)
    step = Step("train", settings, folder)
    if again:
        return step
    if is_trained(folder):
        check_same(step, folder)
        return replace(step, state=HERE)
    if resume:
        return replace(step, settings=settings | {"resume_from_checkpoint": "auto"})
    if "resume_from_checkpoint" not in settings and any(folder.glob("checkpoint-*")):
        raise ValueError(
            f"output_dir: {str(folder)!r} has checkpoints of an unfinished training; pass --resume to go on, or "
            "--force train to start anew"
        )
    return step


def eval_step(recipe: Recipe, train: Step, again: bool) -> Step:
    """The figures of the lens, with every check unless the recipe says which."""
    from ..evaluation.arguments import CHECKS

    arguments, section = recipe.arguments, recipe.sections["eval"]
    settings: dict[str, Any] = {
        "lens": str(recipe.output_dir),
        "rows": arguments.eval_rows,
        "num_samples": arguments.num_samples,
        "fresh_encoder_steps": arguments.eval_fresh_encoder_steps,
    } | section
    is_whole = "controls" not in section and set(section.get("checks", CHECKS)) == set(CHECKS)
    own = recipe.output_dir if is_whole else recipe.output_dir / "evaluation"
    step = Step("eval", settings, Path(settings.get("output_dir", own)))
    if again or train.state == RUNS or not is_evaluated(step.result, recipe.output_dir):
        return step
    check_same(step, recipe.output_dir)
    return replace(step, state=HERE)


def without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say something."""
    return {name: value for name, value in settings.items() if value is not None}
