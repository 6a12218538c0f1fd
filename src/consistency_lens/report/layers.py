"""What a tuned lens of the same subject predicts after every layer, for the beginning of a report's first text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..context_length import context_length
from ..tuned_lens.heatmap import heatmap_data
from ..tuned_lens.lens_places import LENSES_FOLDER, clean_name, default_folder, is_lens
from ..tuned_lens.plots import LENSES
from ..tuned_lens.readings import NORM, TUNED, read_prompt
from ..tuned_lens.records import records_of, token_texts
from ..tuned_lens.saved import open_lens
from ..tuned_lens.suite import suite_of_texts, tokenise_suite
from .explorer import Explorer
from .run_folder import RunFolder

TOKENS, TOP = 32, 5  # of the text, and of each cell


def layers_of(
    asked: str | None, run: RunFolder, explorer: Explorer | None, device: str | None = None
) -> tuple[dict[str, Any] | None, list[str]]:
    """The heatmap of a report.

    Args:
        asked: folder of a tuned lens; None for the one that lies where tuned lenses of the subject lie.
        run: whose subject it is of.
        explorer: whose first text is read.
        device: None for a GPU if there is one.

    Returns:
        What `heatmap_data` gives, and `labels` of its lenses; None where there is no lens or no text, and then why.

    Raises:
        ValueError: if the lens that was asked for cannot be read.
    """
    folder = Path(asked) if asked else found_lens(run)
    if folder is None:
        return None, []
    if explorer is None:
        return None, [f"No heatmap of the tuned lens {folder.name}: there is no text to read with it."]
    try:
        return read_layers(folder, explorer, device), []
    except ValueError as error:
        if asked:
            raise
        return None, [f"No heatmap of the tuned lens {folder.name}: {error}"]


def found_lens(run: RunFolder) -> Path | None:
    """The tuned lens of the run's subject, where `tuned-lens fit` leaves it or beside the run."""
    model = run.recipe.get("model")
    if not model:
        return None
    places = (default_folder(model), run.path.resolve().parent / LENSES_FOLDER / clean_name(model))
    return next((place for place in places if is_lens(place)), None)


def read_layers(folder: Path, explorer: Explorer, device: str | None) -> dict[str, Any]:
    opened = open_lens(folder, device=device)
    lens, text = opened.lens, explorer["texts"][0]
    assert lens is not None  # there is a folder
    pieces = [explorer["words"][place] for place in text["tokens"][:TOKENS]]
    (prompt,) = tokenise_suite(
        suite_of_texts(["".join(pieces)]), opened.tokenizer, context_length(opened.subject.config)
    )
    result, text_of = read_prompt(lens, prompt), token_texts(opened.tokenizer)
    records = {
        name: [replace(record, top20=record.top20[:TOP]) for record in records_of(result, name, text_of)]
        for name in (NORM, TUNED)
    }
    return heatmap_data(records, prompt.prompt.id) | {"labels": {name: LENSES[name].label for name in records}}
