"""Uploading an artifact to the Hugging Face Hub: what belongs to it, with its code, in one commit that holds all."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import EntryNotFoundError

from .atomic_write import write_json
from .hub_connection import asking_hub, check_token
from .public_names import is_path, public_place, without_paths
from .remote_code import auto_map, remote_code

CONFIG_FILE, CARD_FILE = "config.json", "README.md"
# What a run leaves beside the model, in which paths of its machine may stand.
RECORDS = ("provenance.json", "metrics.json", "log_history.json", "run.json", "training_arguments.json")
# All that leaves a folder in which corpora, caches and checkpoints may lie too; nothing of it is a pickle.
ARTIFACT_FILES = (
    CONFIG_FILE, "model.safetensors", CARD_FILE, "LICENSE*", "NOTICE*", *RECORDS, "samples.jsonl", "explanation.png",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
# where a configuration has the name of its subject
SUBJECT_KEYS = ("base_model_name_or_path", "_name_or_path")
TOKEN_PATTERN = r"hf_[A-Za-z0-9]{20,}"
SHORTEST_TOKEN = 8  # a shorter one, as some mirrors take, stands in every text
TEXT_SUFFIXES = (".json", ".jsonl", ".md", ".txt", ".py", ".jinja", ".csv", "")
TAGS = ("consistency-lens", "interpretability")
SHORT_CARD = """# {name}

{kind} of {subject}. How well it does has not been measured here.

```python
import consistency_lens  # or trust_remote_code=True below, where it is not installed
from transformers import AutoModel

model = AutoModel.from_pretrained({arguments})
```
"""


def artifact_files(folder: Path) -> list[Path]:
    """What of a folder belongs to the artifact in it, sorted by name; links are left out."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink())
    return [path for path in files if any(fnmatch(path.name, pattern) for pattern in ARTIFACT_FILES)]


def stage_artifact(folder: Path, staging: Path, model_class: type) -> None:
    """Lays out an artifact as it is published: its own files with no local path in them, and the code that loads it.

    A subject that is in a folder here is named by a relative path, which is nobody's repository on the Hub.

    Args:
        folder: of the artifact, and perhaps of other things, which stay where they are.
        staging: folder for it, made if missing; large files are links to those in `folder` where that is possible.
        model_class: of the artifact.

    Raises:
        ValueError: if one of its JSON files is broken, or a number in it NaN or infinite.
    """
    staging.mkdir(parents=True, exist_ok=True)
    config = publishable_json(folder / CONFIG_FILE)
    places = {name: public_place(name) for name in subjects(config) if is_path(name)}
    for file in artifact_files(folder):
        if file.name in RECORDS:
            write_json(staging / file.name, without_paths(publishable_json(file), places))
        elif file.name != CONFIG_FILE:
            link_or_copy(file, staging / file.name)
    write_json(staging / CONFIG_FILE, {**renamed(config, places), "auto_map": auto_map(model_class)})
    for name, text in remote_code(model_class).items():
        (staging / name).write_text(text, encoding="utf-8")


def publishable_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: if it is broken, or as by `check_finite`.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {str(file)!r} is no JSON ({error}); mend or remove it") from error
    check_finite(content, file.name)
    return content


def check_finite(content: Any, name: str) -> None:
    """Raises a ValueError if a number in JSON content is NaN or infinite: Python reads those, and may not write them.

    Args:
        name: of its file.
    """
    for key, number in _numbers(content):
        if not math.isfinite(number):
            raise ValueError(f"path: {name} has {number} as {key!r}, and JSON no word for it; mend or remove it")


def _numbers(content: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """The numbers with a point in JSON content, and their keys with dots between them."""
    if isinstance(content, float):
        yield place, content
    elif isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _numbers(value, f"{place}.{key}" if place else str(key))


def subjects(config: Any) -> set[str]:
    """The names that a configuration as a dictionary, or those within it, have for the subject."""
    if not isinstance(config, Mapping):
        return set()
    inside = set().union(*map(subjects, config.values())) if config else set()
    return inside | {config[key] for key in SUBJECT_KEYS if config.get(key)}


def renamed(config: Any, places: Mapping[str, str]) -> Any:
    """The configuration with other names for the subject."""
    if not isinstance(config, Mapping):
        return config
    return {
        key: places.get(value, value) if key in SUBJECT_KEYS else renamed(value, places)
        for key, value in config.items()
    }


def link_or_copy(file: Path, target: Path) -> None:
    """The same content under another name; a file that is replaced later leaves it as it is."""
    try:
        os.link(file, target)
    except OSError:  # another file system, or one that knows no links
        shutil.copyfile(file, target)


def create_repo(
    repo_id: str, private: bool | None = None, token: str | bool | None = None, revision: str | None = None
) -> str:
    """Makes a model's repository, and its branch, if they are not there; returns the whole id.

    Raises:
        ValueError: for a user's mistake, such as a token without the right.
        HubError: if the Hub cannot be reached, or fails.
    """
    check_token(token)
    api = HfApi(token=token)
    with asking_hub(repo_id, revision):
        whole = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(whole, branch=revision, exist_ok=True)
    return whole


def commit_folder(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    delete: Sequence[str] = (),
) -> CommitInfo:
    """Uploads a folder in one commit, so that the repository has all of it or none.

    Args:
        revision: branch.
        create_pr: open a pull request with it.
        delete: patterns of what the repository has, and the folder may lack.

    Raises:
        ValueError: as in `create_repo`, or if a token stands in a file.
        HubError: as in `create_repo`.
    """
    check_token(token)
    check_no_token(folder)
    with asking_hub(repo_id, revision):
        return HfApi(token=token).upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=list(delete) or None,
        )


def check_no_token(folder: Path) -> None:
    """Raises a ValueError if a text that is to be published has a token of the Hub in it."""
    own = get_token() or ""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in TEXT_SUFFIXES:
            text = file.read_text(encoding="utf-8", errors="replace")
            if (len(own) >= SHORTEST_TOKEN and own in text) or re.search(TOKEN_PATTERN, text):
                name = file.relative_to(folder)
                raise ValueError(f"path: a token of the Hub stands in {str(name)!r}; take it out there, and revoke it")


def card_in_repo(repo_id: str, token: str | bool | None = None, revision: str | None = None) -> ModelCard | None:
    """The card that a repository has; None if there is none."""
    try:
        file = HfApi(token=token).hf_hub_download(repo_id, CARD_FILE, revision=revision)
    except EntryNotFoundError:
        return None
    return ModelCard.load(file, ignore_metadata_errors=True)


def card_text(
    repo_id: str,
    kind: str,
    config: Any,
    tags: Sequence[str] | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """The repository's own card with the tags in it, or a short one that claims nothing.

    Args:
        kind: what the artifact is, such as "A tuned lens".
        config: of the artifact.

    Raises:
        ValueError, HubError: as in `create_repo`.
    """
    with asking_hub(repo_id, revision):
        card = card_in_repo(repo_id, token, revision)
    if card is None:
        subject = config.base_model_name_or_path
        is_local = not subject or is_path(subject)
        data = ModelCardData(library_name="consistency-lens", base_model=None if is_local else subject, tags=[*TAGS])
        body = SHORT_CARD.format(
            name=repo_id.rpartition("/")[2],
            kind=kind,
            subject="a model that is on no Hub" if is_local else f"[{subject}](https://huggingface.co/{subject})",
            arguments=f'"{repo_id}", base_model="<folder of that model>"' if is_local else f'"{repo_id}"',
        )
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=True)
    known = card.data.get("tags") or []
    card.data["tags"] = list(dict.fromkeys([*known, *(tags or [])])) or None
    return str(card)
