"""Checks of an artifact's folder that are the same for all kinds: its files, its weights, and the model it is of."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..data.activation_cache import file_hash
from ..data.cache_check import Check, VerificationError
from ..data.subject_loading import LoadedSubject
from ..fingerprints import tokenizer_hash, weights_hash
from ..hub_connection import first_line
from ..lens_artifact import WEIGHTS_FILE
from .index import is_pickled


def made_check(name: str, problems: Sequence[str], otherwise: str) -> Check:
    """What was found wrong, a line each, or what was checked."""
    return Check(name, not problems, "\n".join(problems) or otherwise)


def files_check(path: Path, below: bool = True) -> Check:
    """Whether there are weights, nothing that may run code when it is read, and no link to somewhere else.

    Args:
        below: also in the folders inside it.
    """
    found = path.rglob("*") if below else path.iterdir()
    files = [file for file in sorted(found) if file.is_symlink() or file.is_file()]
    problems = [f"{file.relative_to(path)}: {fault}" for file in files if (fault := _fault(file)) is not None]
    if not (path / WEIGHTS_FILE).is_file():
        problems.append(f"{WEIGHTS_FILE}: missing")
    return made_check("files", problems, f"{len(files)}, weights as safetensors")


def _fault(file: Path) -> str | None:
    if file.is_symlink():
        return "a symbolic link, which may lead anywhere; put the file itself there"
    if is_pickled(file.name):
        return "pickled, which may run code when it is read; only safetensors are taken"
    return None


def checksums_check(path: Path, recorded: Mapping[str, str], where: str) -> Check:
    """Whether each file that is named has its sha256."""
    problems = []
    for name, digest in recorded.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name}: missing")
        elif (found := file_hash(file)) != digest:
            problems.append(f"{name}: sha256 {found[:12]}…, not {str(digest)[:12]}…")
    return made_check("checksums", problems, where)


def weights_check(path: Path) -> Check:
    """Whether the weights are safetensors, and finite; one tensor at a time is read."""
    file = path / WEIGHTS_FILE
    if not file.is_file():
        return Check("weights", False, f"{WEIGHTS_FILE}: missing", checked=False)
    problems, count, numbers = [], 0, 0
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                tensor = tensors.get_tensor(name)
                count, numbers = count + 1, numbers + tensor.numel()
                if not torch.isfinite(tensor).all():
                    problems.append(f"{name}: NaN or infinity")
    except (SafetensorError, OSError) as error:
        return Check("weights", False, f"{WEIGHTS_FILE}: no safetensors ({first_line(error)})")
    problems += [] if count else ["no tensors"]
    return made_check("weights", problems, f"{count} tensors, {numbers:,} numbers, all finite")


def subject_checks(
    commit: str | None, weights: str | None, tokenizer: str | None, subject: LoadedSubject
) -> list[Check]:
    """Whether a model is the one that an artifact was made for.

    Args:
        commit, weights, tokenizer: of that one, the commit on the Hub and two hashes, as far as they are recorded.
        subject: as it was loaded.
    """
    if commit is None or subject.revision is None:
        revision = Check("revision", True, "of a local folder, which has none: the weights are compared")
    else:
        problems = [] if commit == subject.revision else [f"loaded {subject.revision}, fitted on {commit}"]
        revision = made_check("revision", problems, commit)
    return [
        revision,
        _hash_check("model weights", weights_hash(subject.model), weights),
        _hash_check("tokenizer", tokenizer_hash(subject.tokenizer), tokenizer),
    ]


def _hash_check(name: str, found: str, wanted: str | None) -> Check:
    if wanted is None:
        return Check(name, False, f"hash {found[:12]}…, and none is recorded", checked=False)
    detail = f"hash {found[:12]}…" if found == wanted else f"hash {found[:12]}…, not {wanted[:12]}…"
    return Check(name, found == wanted, detail)


def failed(checks: Sequence[Check]) -> list[Check]:
    """Those that have found something wrong."""
    return [check for check in checks if check.checked and not check.passed]


def raise_if_failed(checks: Sequence[Check], artifact: str) -> None:
    """Raises a VerificationError of one line for the checks that have found something wrong."""
    told = "; ".join(f"{check.name}: {check.detail.splitlines()[0]}" for check in failed(checks))
    if told:
        raise VerificationError(f"{artifact} does not pass verification ({told})")
