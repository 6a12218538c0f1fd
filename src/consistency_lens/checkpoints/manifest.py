"""The manifest of a checkpoint: written last, it names every file with size and sha256, so that a torn one shows.

A folder without it is no checkpoint. All processes of a run share the hashing, piece by piece.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments

from ..atomic_write import sync_folder, write_text

MANIFEST_FILE = "manifest.json"
# Large files are hashed in pieces, by several threads and processes at once.
PIECE_BYTES = 1 << 28
BLOCK_BYTES = 1 << 20
THREADS = 4


class Piece(NamedTuple):
    """Bytes `number * PIECE_BYTES` and on of a file, by its path in the checkpoint."""

    file: str
    number: int


def write_manifest(folder: Path, args: TrainingArguments) -> None:
    """Makes a checkpoint whole: waits for the files of all processes, syncs them to the disk, and names them.

    To be called by every process of the run.

    Args:
        folder: the checkpoint.
        args: of the run; they say which process this is, and whether each node has files of its own.
    """
    wait_for_everyone(args)
    # one process looks, for a network's file system may show the others an old listing
    listing: list[Any] = [file_sizes(folder) if args.should_save else {}]
    if args.world_size > 1 and not args.save_on_each_node:
        broadcast_object_list(listing)
    sizes: dict[str, int] = listing[0]
    found = digests(folder, shared_out(pieces_of(sizes, PIECE_BYTES), args), PIECE_BYTES)
    if not args.save_on_each_node:
        found = dict(gathered(list(found.items()), args))
    if args.should_save:
        sync_folder(folder)
        files = {
            name: {"bytes": size, "sha256": [found[piece] for piece in pieces_of({name: size}, PIECE_BYTES)]}
            for name, size in sizes.items()
        }
        write_text(folder / MANIFEST_FILE, manifest_text({"piece_bytes": PIECE_BYTES, "files": files}))


def tear_in(folder: Path, args: TrainingArguments) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is whole. To be called by every process of the run.

    Args:
        folder: the checkpoint.
        args: as in `write_manifest`.
    """
    found = gathered([own_share_of_tear(folder, args)], args)
    return next((problem for problem in found if problem is not None), None)


def own_share_of_tear(folder: Path, args: TrainingArguments) -> str | None:
    """As `tear_in`, but of the pieces that fall to this process."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return f"no {MANIFEST_FILE}: its writing was cut short"
    content = read_manifest(path)
    if content is None:
        return f"{MANIFEST_FILE} is damaged"
    sizes = {name: file["bytes"] for name, file in content["files"].items()}
    for name, size in sizes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes of {size}"
    own = shared_out(pieces_of(sizes, content["piece_bytes"]), args)
    for piece, digest in digests(folder, own, content["piece_bytes"]).items():
        if content["files"][piece.file]["sha256"][piece.number] != digest:
            return f"{piece.file} is damaged: its sha256 is another"
    return None


def manifest_text(content: Mapping[str, Any]) -> str:
    """The manifest as it is written: with a hash of its own."""
    whole = {**content, "sha256": sha256(json.dumps(content).encode()).hexdigest()}
    return json.dumps(whole, indent=2) + "\n"


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest; None if a byte of it is not as it was written."""
    written = path.read_bytes()
    try:
        content = json.loads(written)
        del content["sha256"]
    except (ValueError, KeyError, TypeError):
        return None
    return content if manifest_text(content).encode() == written else None


def file_sizes(folder: Path) -> dict[str, int]:
    """Every file of a checkpoint but the manifest, by its path in there, with its size in bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def pieces_of(sizes: Mapping[str, int], piece_bytes: int) -> list[Piece]:
    """The pieces of files of these sizes; an empty file has one."""
    return [Piece(name, n) for name, size in sizes.items() for n in range(max(1, -(-size // piece_bytes)))]


def shared_out(pieces: Sequence[Piece], args: TrainingArguments) -> Sequence[Piece]:
    """The pieces that this process hashes."""
    if args.save_on_each_node:
        return pieces if args.should_save else []
    return pieces[args.process_index :: args.world_size]


def digests(folder: Path, pieces: Iterable[Piece], piece_bytes: int) -> dict[Piece, str]:
    """sha256 of each piece, in hexadecimal."""

    def digest(piece: Piece) -> str:
        state, left = sha256(), piece_bytes
        with open(folder / piece.file, "rb") as file:
            file.seek(piece.number * piece_bytes)
            while left > 0 and (block := file.read(min(left, BLOCK_BYTES))):
                state.update(block)
                left -= len(block)
        return state.hexdigest()

    pieces = list(pieces)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(pieces, pool.map(digest, pieces), strict=True))


def gathered(values: list[Any], args: TrainingArguments) -> list[Any]:
    """The values of all processes, one after the other."""
    return gather_object(values) if args.world_size > 1 else values


def wait_for_everyone(args: TrainingArguments) -> None:
    """Returns when every process of the run has come here."""
    if args.world_size > 1:
        args.distributed_state.wait_for_everyone()
