"""What a pull of lenses refuses, and that it leaves nothing then."""

import json
import os

import pytest
import torch
from hub_faults import Fault
from pulled_lenses import LONE, TAG, kept, left, names, pull, put, reindex, released
from safetensors.torch import save_file

from consistency_lens.data.cache_check import VerificationError
from consistency_lens.hub.lens_collection import list_lenses

__all__ = ["kept", "released"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_a_file_with_another_checksum_is_refused_and_nothing_is_left(released, tmp_path, name):
    content = bytearray(released.model(LONE).head.files[name].content)
    content[len(content) // 2] ^= 1
    put(released, name, bytes(content), LONE)
    with pytest.raises(VerificationError, match=f"{name} of '{LONE}' has sha256 .* INDEX.json says"):
        pull(tmp_path / "lens", LONE, revision="main")
    assert left(tmp_path) == []
    pull(tmp_path / "lens", LONE, revision=TAG)  # the release is as it was


def test_a_file_of_another_size_is_not_even_fetched(released, tmp_path):
    put(released, "model.safetensors", b"x" * 1000, LONE)
    released.requests.clear()
    with pytest.raises(VerificationError, match="model.safetensors of .* has 1,000 bytes, not"):
        pull(tmp_path / "lens", LONE, revision="main")
    assert released.count("GET", "resolve/.*/(?!INDEX)") == 0


def test_bytes_that_change_on_the_way_are_refused(released, tmp_path):
    released.plan(Fault.CORRUPT, "GET", "model.safetensors")
    with pytest.raises(VerificationError, match="pull again or pass another revision"):
        pull(tmp_path / "lens", LONE)
    assert left(tmp_path) == []
    pull(tmp_path / "lens", LONE)
    released.plan(Fault.CORRUPT, "GET", "INDEX.json")
    with pytest.raises(VerificationError, match="INDEX.json of .* damaged on its way, try again"):
        list_lenses(LONE)


def test_a_file_that_is_missing_is_told(released, tmp_path):
    head = dict(released.model(LONE).head.files)
    del head["metrics.json"]
    released.model(LONE).commit("main", "drop", head)
    with pytest.raises(ValueError, match=r"lacks a file that it names \(metrics.json\); it is incomplete"):
        pull(tmp_path / "lens", LONE, revision="main")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "old/state.pkl", "STATE.PT", "last.ckpt"])
def test_a_repository_with_a_pickle_is_refused(released, tmp_path, name):
    put(released, name, b"\x80\x04", LONE)
    with pytest.raises(ValueError, match=f"holds '{name}', which is pickled and may run code when it is read"):
        pull(tmp_path / "lens", LONE, revision="main")
    assert left(tmp_path) == []


def test_a_pickle_beside_a_lens_is_not_in_the_way_of_another(released, tmp_path):
    put(released, "one/state.pkl", b"\x80\x04")
    pull(tmp_path / "lens", lens="two", revision="main")
    with pytest.raises(ValueError, match="holds 'one/state.pkl'"):
        pull(tmp_path / "all", revision="main")


def test_links_in_the_place_of_a_pull_are_not_followed(released, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for target in ("elsewhere", "nowhere"):
        os.symlink(tmp_path / target, tmp_path / f"to_{target}")
        with pytest.raises(ValueError, match="is a symbolic link; pass the folder itself, or delete the link"):
            pull(tmp_path / f"to_{target}", LONE)
    partial = tmp_path / f".lens.{released.model(LONE).head.oid[:12]}.partial"
    partial.mkdir()
    os.symlink(tmp_path / "elsewhere" / "x", partial / "config.json")
    with pytest.raises(ValueError, match="config.json' is a symbolic link; delete .* and pull again"):
        pull(tmp_path / "lens", LONE)
    assert names(tmp_path / "elsewhere") == set()


def test_weights_that_are_not_finite_do_not_take_their_place(released, tmp_path):
    weights = tmp_path / "x.safetensors"
    save_file({"projection": torch.full((64,), torch.nan)}, weights)
    content = weights.read_bytes()
    weights.unlink()
    put(released, "model.safetensors", content, LONE)
    files = json.loads(released.model(LONE).head.files["INDEX.json"].content)["lenses"]["lens"]["files"]
    digest = released.model(LONE).head.files["model.safetensors"].sha256
    reindex(released, files=files | {"model.safetensors": {"sha256": digest, "bytes": len(content)}})
    with pytest.raises(VerificationError, match="weights: projection: NaN or infinity"):
        pull(tmp_path / "lens", LONE, revision="main")
    assert left(tmp_path) == []


def test_an_index_that_tells_of_another_lens_is_refused(released, tmp_path):
    base = {"name": "org/famous", "revision": "d" * 40, "weights_hash": "b" * 64}
    reindex(released, base_model=base)
    with pytest.raises(VerificationError, match="index: base model: 'somewhere' here, 'org/famous' in INDEX.json"):
        pull(tmp_path / "lens", LONE, revision="main")
    assert left(tmp_path) == []
