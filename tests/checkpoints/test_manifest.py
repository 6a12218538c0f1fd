"""A checkpoint that is not what was written shows, whatever is wrong with it."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
from checkpoint_runs import DiesAt, Killed, tiny_run

from consistency_lens.checkpoints import manifest as written
from consistency_lens.checkpoints.manifest import (
    MANIFEST_FILE,
    digests,
    file_sizes,
    pieces_of,
    shared_out,
    tear_in,
)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = tiny_run(tmp_path_factory.mktemp("run"), save_steps=7)
    trainer.add_callback(DiesAt(8))
    with pytest.raises(Killed):
        trainer.train()
    return trainer


@pytest.fixture
def checkpoint(trainer, tmp_path):
    """A copy of a checkpoint of the second stage, with the reference of the warm start."""
    shutil.copytree(f"{trainer.args.output_dir}/checkpoint-7", tmp_path / "checkpoint-7")
    return tmp_path / "checkpoint-7"


FILES = {
    "model.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.json", "rng_state_0.safetensors",
    "rng_state_0.json", "unlogged_0.safetensors", "reference.safetensors", "trainer_state.json", "progress.json",
    "training_arguments.json", "skipped_steps.json", "config.json",
}  # fmt: skip


def test_the_manifest_names_every_file(trainer, checkpoint):
    files = {path.name for path in checkpoint.iterdir()}
    assert files >= FILES
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    assert manifest["files"].keys() == files - {MANIFEST_FILE}
    assert tear_in(checkpoint, trainer.args) is None


def test_a_file_that_is_cut_anywhere_is_named(trainer, checkpoint):
    draw = random.Random(0)
    for path in list(checkpoint.iterdir()):
        whole = path.read_bytes()
        for size in {0, 1, len(whole) // 2, draw.randrange(len(whole)), len(whole) - 1}:
            path.write_bytes(whole[:size])
            tear = tear_in(checkpoint, trainer.args)
            assert tear is not None and tear.startswith(path.name), (path.name, size)
        path.write_bytes(whole)
    assert tear_in(checkpoint, trainer.args) is None


def test_a_byte_that_is_another_is_found_in_every_file(trainer, checkpoint):
    draw = random.Random(1)
    for path in list(checkpoint.iterdir()):
        whole = path.read_bytes()
        for place in {0, draw.randrange(len(whole)), len(whole) - 1}:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            tear = tear_in(checkpoint, trainer.args)
            assert tear is not None and tear.startswith(f"{path.name} is damaged"), (path.name, place)
        path.write_bytes(whole)


def test_a_file_that_is_missing_is_named(trainer, checkpoint):
    for path in list(checkpoint.iterdir()):
        whole = path.read_bytes()
        path.unlink()
        tear = tear_in(checkpoint, trainer.args)
        expected = "no manifest.json" if path.name == MANIFEST_FILE else f"{path.name} is missing"
        assert tear is not None and tear.startswith(expected)
        path.write_bytes(whole)


def test_the_files_are_on_the_disk_before_the_manifest_names_them(trainer, checkpoint, monkeypatch):
    (checkpoint / MANIFEST_FILE).unlink()
    synced = []

    def note(folder):
        synced.append((folder, (folder / MANIFEST_FILE).exists()))

    monkeypatch.setattr(written, "sync_folder", note)
    written.write_manifest(checkpoint, trainer.args)
    assert synced == [(checkpoint, False)] and (checkpoint / MANIFEST_FILE).exists()


def rank(index, count, each_node=False, saves=True):
    return SimpleNamespace(process_index=index, world_size=count, save_on_each_node=each_node, should_save=saves)


def test_processes_share_the_pieces_of_large_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "shard").write_bytes(bytes(range(250)) * 4)
    (tmp_path / "empty").touch()
    sizes = file_sizes(tmp_path)
    assert sizes == {"deep/shard": 1000, "empty": 0}
    pieces = pieces_of(sizes, 300)
    assert len(pieces) == 5
    alone = digests(tmp_path, pieces, 300)
    assert len(set(alone.values())) == 5
    for count in (1, 2, 3, 7):
        shares = [digests(tmp_path, shared_out(pieces, rank(i, count)), 300) for i in range(count)]
        assert sum(map(len, shares)) == 5
        assert {piece: digest for share in shares for piece, digest in share.items()} == alone
    # where nodes have disks of their own, one process of each reads all that is there
    assert shared_out(pieces, rank(2, 4, each_node=True)) == pieces
    assert shared_out(pieces, rank(3, 4, each_node=True, saves=False)) == []


def test_every_piece_is_checked(trainer, checkpoint, monkeypatch):
    monkeypatch.setattr(written, "PIECE_BYTES", 1000)
    written.write_manifest(checkpoint, trainer.args)
    monkeypatch.undo()  # the pieces are those of the manifest
    path = checkpoint / "model.safetensors"
    whole = path.read_bytes()
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    assert len(manifest["files"][path.name]["sha256"]) == -(-len(whole) // 1000) > 5
    assert tear_in(checkpoint, trainer.args) is None
    for place in range(500, len(whole), 1000):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert tear_in(checkpoint, trainer.args) == "model.safetensors is damaged: its sha256 is another"
