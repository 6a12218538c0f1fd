"""A sweep: both lenses over a suite of prompts, as record files and a run JSON, with KPIs, gates and diagnostics."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..atomic_write import write_json
from ..context_length import context_length
from .gates import Judgement, judge
from .kpis import SEED, compute_kpis
from .lens_places import clean_name, default_folder, is_lens
from .modeling_tuned_lens import TunedLens
from .readings import NORM, TUNED, PromptResult, read_prompt
from .records import file_names, record_files, token_texts
from .suite import Prompt, TokenisedPrompt, suite_hash, tokenise_suite
from .summaries import diagnostics, layer_figures, prompt_entry

logger = logging.getLogger(__name__)

AUTO, REQUIRE, OFF = "auto", "require", "off"
WHEN_TUNED = (AUTO, REQUIRE, OFF)


def find_lens(model: str, tuned: str = AUTO, path: str | Path | None = None) -> Path | None:
    """The folder of a model's tuned lens, if there is one and it is to be used.

    Args:
        model: Hub id or folder of the model.
        tuned: "auto" for the lens if there is one, "require" for an error if there is none, "off" for none.
        path: where it lies; `tuned_lenses/<name of the model>` if None.

    Raises:
        ValueError: if there is none, and one is required or was said to lie at `path`; if `tuned` is none of the
            three.
    """
    if tuned not in WHEN_TUNED:
        raise ValueError(f"tuned must be one of {', '.join(WHEN_TUNED)}, got {tuned!r}")
    if tuned == OFF:
        return None
    name = clean_name(model)
    folder = default_folder(model) if path is None else Path(path)
    if is_lens(folder):
        return folder
    missing = (
        f"Tuned Lens not found for `{name}`. Train it with `consistency-lens tuned-lens fit --model {model}` "
        f"(looked in {str(folder)!r})"
    )
    if tuned == REQUIRE or path is not None:
        raise ValueError(missing)
    logger.info("%s; going on with the norm lens alone", missing)
    return None


def sweep(
    lens: TunedLens | None,
    subject: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Sequence[Prompt],
    folder: str | Path,
    name: str = "sweep",
    *,
    suite_name: str = "default",
    model_id: str | None = None,
    revision: str | None = None,
    num_resamples: int = 1000,
    seed: int = SEED,
    progress: bool = True,
) -> dict[str, Any]:
    """Reads a suite with the norm lens and, if there is one, the tuned lens; writes record files and the run JSON.

    Args:
        lens: the tuned lens of the subject; None for the norm lens alone.
        subject: the causal language model.
        tokenizer: its tokenizer.
        suite: the prompts.
        folder: where the files go; made if missing. Files of an earlier sweep of this name are replaced, and those of
            a tuned lens that is not there any more removed.
        name: what the files' names begin with.
        suite_name: what the run JSON calls the suite.
        model_id, revision: what the run JSON calls the model.
        num_resamples, seed: of the intervals.
        progress: show a progress bar.

    Returns:
        The content of `<name>.json`.

    Raises:
        ValueError: if a prompt does not fit the model, or a lens gives what is not finite.
    """
    folder = Path(folder)
    reader = TunedLens.for_model(subject, tokenizer, rank=1) if lens is None else lens
    tokenised = tokenise_suite(suite, tokenizer, context_length(subject.config))
    lenses = (NORM,) if lens is None else (NORM, TUNED)
    with record_files(folder, name, lenses, tokenizer) as write:
        results = read_results(reader, tokenised, lens is not None, write, progress)
    if lens is None:
        for file in file_names(name, TUNED):
            (folder / file).unlink(missing_ok=True)
    text_of = token_texts(tokenizer)
    about_suite = suite_facts(suite, suite_name)
    tuned_lens: dict[str, Any] = {"enabled": False}
    if lens is not None:
        judgement = judge_results(results, about_suite, num_resamples, seed)
        tuned_lens = {"enabled": True, **(lens.provenance or {}), **judgement.as_dict()}
    run = {
        "name": name,
        "model_id": model_id or subject.config.name_or_path,
        "model_commit": revision,
        "num_layers": reader.num_layers,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "seed": seed,
        "suite": about_suite,
        "lenses": list(lenses),
        "files": [file for of in lenses for file in file_names(name, of)],
        "prompts": [prompt_entry(result, text_of) for result in results],
        "layers": layer_figures(results),
        "diagnostics": diagnostics(results),
        "tuned_lens": tuned_lens,
    }
    write_json(folder / f"{name}.json", run)
    return run


def suite_facts(suite: Sequence[Prompt], name: str) -> dict[str, Any]:
    """What is written of a suite beside the figures."""
    return {"name": name, "prompts": len(suite), "sha256": suite_hash(suite)}


def read_results(
    lens: TunedLens,
    suite: Sequence[TokenisedPrompt],
    with_tuned: bool = True,
    write: Callable[[PromptResult], None] | None = None,
    progress: bool = True,
) -> list[PromptResult]:
    """Reads a suite, one prompt after the other.

    Args:
        lens: with its subject.
        suite: the prompts in the subject's tokens.
        with_tuned: whether the lens's translators are read; without, it stands for its subject alone.
        write: gets what was read of each prompt.
        progress: show a progress bar.

    Returns:
        What was read, without the top tokens.

    Raises:
        ValueError: if a lens gives what is not finite.
    """
    results = []
    for prompt in tqdm(suite, unit="prompt", desc="sweep", disable=not progress):
        result = read_prompt(lens, prompt, with_tuned)
        if write is not None:
            write(result)
        results.append(result.without_top())
    return results


def judge_results(
    results: Sequence[PromptResult], suite: Mapping[str, Any], num_resamples: int = 1000, seed: int = SEED
) -> Judgement:
    """KPIs and gates of what a tuned lens was read to say; `suite` is what `suite_facts` gives."""
    kpis = compute_kpis([result.for_kpis() for result in results], num_resamples, seed)
    return Judgement(kpis, judge(kpis), suite)


def judge_lens(
    lens: TunedLens,
    suite: Sequence[Prompt],
    suite_name: str = "default",
    num_resamples: int = 1000,
    seed: int = SEED,
    progress: bool = True,
) -> tuple[Judgement, dict[str, Any]]:
    """Judges a lens on a suite; nothing is written.

    Returns:
        The judgement, and what stands beside it: figures of each layer, and diagnostics.

    Raises:
        ValueError: if the lens has no tokenizer, or a prompt does not fit the model.
    """
    tokenised = tokenise_suite(suite, lens.require_tokenizer(), context_length(lens.subject_model.config))
    results = read_results(lens, tokenised, progress=progress)
    judgement = judge_results(results, suite_facts(suite, suite_name), num_resamples, seed)
    return judgement, {"layers": layer_figures(results), "diagnostics": diagnostics(results)}
