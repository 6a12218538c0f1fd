"""Caches that are not published, and pushes that the Hub refuses: one line that says why."""

import json
import shutil

import pytest
from hub_http import error
from hub_server import TOKEN
from published_caches import REPO, build_caches, built, layer, push

from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.cache_check import VerificationError
from consistency_lens.hub.cache_push import push_cache
from consistency_lens.hub_connection import HubError

__all__ = ["built", "layer"]


# Texts that differ in their last word alone.
SAME_TEXTS = [" ".join(["w5"] * 30 + [f"w{9 + i}"]) for i in range(40)]


# The caches


def test_splits_with_documents_in_common_are_refused(hub, layer):
    shutil.rmtree(layer / "validation")
    shutil.copytree(layer / "train", layer / "validation")
    file = layer / "validation" / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset_split": "validation"}))
    shared = len(set(ActivationCache.open(layer / "train").documents))
    with pytest.raises(ValueError, match=f"'train' and 'validation' share {shared} documents"):
        push(layer)
    assert hub.repos == {}


def test_a_validation_split_of_training_text_alone_is_refused(hub, tmp_path):
    with pytest.raises(ValueError, match="have contexts of their own, from fewer than two documents"):
        push(build_caches(tmp_path, texts=SAME_TEXTS).layer)
    assert hub.repos == {}


def test_a_damaged_cache_is_not_published(hub, layer):
    shard = layer / "train" / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(VerificationError, match="train at .* does not pass .*shard-00001.arrow"):
        push(layer)
    assert hub.repos == {}


def test_splits_of_different_caches_do_not_go_together(hub, layer, tmp_path):
    other = build_caches(tmp_path / "other", dtype="float32").layer
    shutil.rmtree(layer / "validation")
    shutil.copytree(other / "validation", layer / "validation")
    with pytest.raises(ValueError, match="no splits of one cache: dtype is 'float16' and 'float32'"):
        push(layer)


def test_two_caches_of_one_split_and_unfinished_ones_are_refused(hub, layer, tmp_path):
    shutil.copytree(layer / "train", layer / "train2")
    with pytest.raises(ValueError, match="'train' and 'train2' are both of split 'train'"):
        push(layer)
    (layer / "train2" / "provenance.json").rename(layer / "train2" / "building.json")
    with pytest.raises(ValueError, match="train2' is unfinished"):
        push(layer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no activation cache at"):
        push(tmp_path / "empty")
    with pytest.raises(ValueError, match="no folder at"):
        push(tmp_path / "nowhere")


# The Hub


@pytest.mark.parametrize(
    ("files", "path", "private", "message"),
    [
        ({"data/train.parquet": b"x"}, ".", False, "holds a data set that is no activation cache"),
        ({"provenance/validation.json": b"{}"}, "train", False, "has the split 'validation' too, which this push"),
        ({"provenance/train.json": b"{}"}, ".", True, "is there and public"),
    ],
)
def test_nothing_of_others_is_overwritten_or_shown(hub, layer, files, path, private, message):
    repo = hub.add_repo("dataset", REPO, files)
    with pytest.raises(ValueError, match=message):
        push(layer / path, private=private)
    assert len(repo.commits) == 1


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_wrong", "does not take the token"), ("", "no token to write to 'user/tiny-activations'")],
)
def test_a_wrong_or_missing_token_is_a_mistake_and_not_shown(hub, layer, monkeypatch, tmp_path, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with pytest.raises(ValueError, match=message) as caught:
        push(layer)
    assert "\n" not in str(caught.value) and "hf_wrong" not in str(caught.value)
    assert hub.repos == {}


@pytest.mark.parametrize("status", [400, 422])
def test_what_the_hub_refuses_is_a_mistake_in_its_words(hub, layer, status):
    hub.faults["POST", "/commit/"] = error(status, "", "a file has no name")
    with pytest.raises(ValueError, match=f"does not take this for .*{status}: .*a file has no name"):
        push(layer)


def test_another_ones_name_is_a_mistake(hub, layer):
    with pytest.raises(ValueError, match="no right to do that in 'someone/cache' .403: You don't have the rights"):
        push_cache(layer, "someone/cache", progress=False)
    assert hub.repos == {} and not layer.with_name(".layer_1.push").exists()


def test_an_endpoint_that_is_not_there_fails_at_once(hub, layer):
    hub.__exit__()
    with pytest.raises(HubError, match="fails or cannot be reached") as caught:
        push(layer)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert not layer.with_name(".layer_1.push").exists()


def test_a_refusal_in_the_middle_is_one_line(hub, layer):
    hub.faults["PUT", "/large/"] = error(403, "", "storage is full")
    with pytest.raises(ValueError, match="403: .*storage is full"):
        push(layer)
