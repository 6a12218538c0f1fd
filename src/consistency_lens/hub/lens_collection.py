"""What a repository of lenses holds, and the card of one that holds several."""

from collections.abc import Mapping

from huggingface_hub import ModelCardData

from .cards import LIBRARY, NOT_MEASURED, TAGS, hub_link, render
from .download import MODEL
from .index import IndexedRepository, open_index
from .lens_index import LensEntry, read_lens_index
from .markdown import code, plain, table

LensRepository = IndexedRepository[LensEntry]
KIND_NAMES = {
    "consistency_lens": "lens",
    "consistency_lens_decoder": "decoder",
    "consistency_lens_encoder": "encoder",
}
COLUMNS = ("lens", "kind", "base model", "layer", "T", "FVE", "KL recovered", "release")


def list_lenses(repo: str, revision: str | None = None, also_unfinished: bool = False) -> LensRepository:
    """What a repository holds, name -> lens; see `hub.index.open_index`.

    Args:
        repo: id of the model repository.
        revision: tag of a release, commit or branch; default: main, or the newest release that was finished.
        also_unfinished: whether main is taken as it is.

    Raises:
        ValueError: if there is no such repository or revision, or it holds no lenses.
        VerificationError: if the index was damaged on its way.
        HubError: if the Hub cannot be reached, or fails.
    """
    return open_index(repo, MODEL, revision, read_lens_index, "lenses", also_unfinished)


def collection_card(repo: str, tag: str, entries: Mapping[str, LensEntry]) -> str:
    """The card of a repository with several lenses, written from its index.

    Args:
        repo: its id.
        tag: of the release that it comes with.
        entries: name -> lens.
    """
    bases = {entry.base_model.name for entry in entries.values() if entry.base_model.revision is not None}
    licenses = sorted({entry.license for entry in entries.values() if entry.license is not None})
    metadata = ModelCardData(
        library_name=LIBRARY,
        base_model=sorted(bases) or None,
        license=licenses[0] if len(licenses) == 1 else "other" if licenses else None,
        tags=list(TAGS),
    )
    rows = [
        (
            f"[{plain(name)}]({name}/README.md)",
            KIND_NAMES[entry.kind],
            hub_link(entry.base_model.name, entry.base_model.revision),
            str(entry.layer),
            str(entry.num_text_tokens),
            *(figure(entry, of) for of in ("fve", "kl_recovered")),
            entry.release,
        )
        for name, entry in sorted(entries.items())
    ]
    return render(
        "lens_collection_card.md.jinja",
        metadata=metadata.to_yaml(),
        name=repo.rpartition("/")[2],
        repo=repo,
        tag=tag,
        first=next(iter(sorted(entries))),
        lenses=table(COLUMNS, rows),
        licenses=", ".join(code(license) for license in licenses) or "none is stated",
    )


def figure(entry: LensEntry, name: str) -> str:
    """A figure of an entry, as it was measured."""
    return f"{entry.metrics[name]:.3f}" if name in entry.metrics else NOT_MEASURED
