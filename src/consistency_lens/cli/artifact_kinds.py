"""What the commands that publish and fetch find at a path or in a repository: lenses, tuned lenses or caches."""

from pathlib import Path

LENS, TUNED_LENS, CACHE = "lens", "tuned lens", "activation cache"
# where the web has the repositories of data sets
DATASETS = "datasets/"


def find_artifacts(path: Path) -> dict[str, list[Path]]:
    """Kind -> the folders at a path or below it; kinds that are not there are left out.

    Raises:
        ValueError: if there is no folder, or a model that is no lens.
    """
    import json

    from ..data.cache_verification import find_caches, is_cache
    from ..hub.lens_checks import find_lenses, is_lens
    from ..tuned_lens.content_checks import find_tuned_lenses
    from ..tuned_lens.lens_places import is_own

    if not path.is_dir():
        raise ValueError(f"path: no folder at {str(path)!r}; pass that of a lens, a tuned lens or an activation cache")
    if is_lens(path):
        return {LENS: [path]}
    if is_own(path):
        return {TUNED_LENS: [path]}
    if is_cache(path):
        return {CACHE: [path]}
    if (path / "config.json").is_file():
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
        raise ValueError(f"path: {str(path)!r} holds a model ({kind}) that is no lens; pass the folder of a lens")
    found = {LENS: find_lenses(path)}
    for kind, find in ((TUNED_LENS, find_tuned_lenses), (CACHE, find_caches)):
        try:
            found[kind] = find(path)
        except ValueError:
            found[kind] = []
    # the corpus of a training lies in the lens's own folder
    found[CACHE] = [cache for cache in found[CACHE] if not any(lens in cache.parents for lens in found[LENS])]
    return {kind: folders for kind, folders in found.items() if folders}


def kind_of_folder(path: Path) -> str:
    """What a folder holds.

    Raises:
        ValueError: if that is nothing, or of several kinds.
    """
    found = find_artifacts(path)
    if not found:
        raise ValueError(f"path: no lens and no activation cache at {str(path)!r} or below it; pass one")
    if len(found) > 1:
        raise ValueError(f"path: {str(path)!r} holds {' and '.join(found)}; pass the folder of one kind")
    return next(iter(found))


def kind_of_repository(repo: str) -> tuple[str, str]:
    """Id of a repository, and what it holds; `datasets/` before the id asks for the data set of that name alone.

    Raises:
        ValueError: if there is none, or a model and a data set of that name.
        HubError: if the Hub cannot be reached, or fails.
    """
    from ..hub.download import DATASET, MODEL
    from ..hub.index import INDEX_FILE

    name, kinds = repo.removeprefix(DATASETS), (DATASET,) if repo.startswith(DATASETS) else (MODEL, DATASET)
    found = {kind: files for kind in kinds if (files := _files(name, kind)) is not None}
    if not found:
        raise ValueError(
            f"repo: no {name!r} on the Hub, or it is private; check the name, or log in with `hf auth login`"
        )
    if len(found) > 1:
        raise ValueError(f"repo: {name!r} is a model and a data set; write {DATASETS}{name} for the data set")
    if MODEL in found:
        return name, LENS
    return name, TUNED_LENS if INDEX_FILE in found[DATASET] else CACHE


def _files(repo: str, kind: str) -> set[str] | None:
    """The paths in a repository; None if it is not there."""
    from huggingface_hub.errors import RepositoryNotFoundError

    from ..hub.releases import repository_info
    from ..hub_connection import asking_hub

    with asking_hub(repo):
        try:
            info = repository_info(repo, kind)
        except RepositoryNotFoundError:
            return None
    return {sibling.rfilename for sibling in info.siblings or []}
