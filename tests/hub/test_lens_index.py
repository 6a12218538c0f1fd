"""The index of published lenses: read as it was written, and refused if it is not as it must be."""

import json
import re

import pytest
from pulled_lenses import LONE, REPO, kept, left, pull, put, reindex, released

from consistency_lens.hub import index
from consistency_lens.hub.lens_collection import list_lenses
from consistency_lens.hub.lens_index import index_text, read_lens_index

__all__ = ["kept", "released"]

HOSTILE = [
    "../x", "..", "/etc/passwd", "a/b", "a\\b", "..\\x", "C:x", "C:\\x", ".hidden", "", "x\n", "INDEX.json",
    "x.pt", "x.BIN",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_with_a_file_that_leads_elsewhere_is_refused(released, name):
    content = json.loads(released.model(LONE).head.files["INDEX.json"].content)
    content["lenses"]["lens"]["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    with pytest.raises(ValueError, match=re.escape(f"{name!r} is no file of a lens; pass another revision")):
        read_lens_index(json.dumps(content), LONE)


def test_with_such_an_index_nothing_is_fetched(released, tmp_path):
    files = json.loads(released.model(LONE).head.files["INDEX.json"].content)["lenses"]["lens"]["files"]
    reindex(released, files=files | {"../x": {"sha256": "0" * 64, "bytes": 1}})
    released.requests.clear()
    with pytest.raises(ValueError, match="'../x' is no file of a lens"):
        pull(tmp_path / "lens", LONE)
    assert left(tmp_path) == [] and released.count("GET", "resolve/.*/(?!INDEX)") == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "../lens"}, "the path is '../lens'"),
        ({"path": "/lens"}, "the path is '/lens'"),
        ({"kind": "llama"}, "the kind is 'llama'"),
        ({"release": "latest"}, "the release is 'latest'"),
        ({"layer": "3"}, "whole numbers"),
        ({"num_text_tokens": True}, "whole numbers"),
        ({"metrics": {"fve": "0.9"}}, "metrics must be numbers"),
        ({"base_model": {"name": "x"}}, "base_model must have"),
        ({"base_model": {"name": "x", "revision": 3, "weights_hash": None}}, "a text of base_model"),
        ({"files": {"config.json": {"sha256": "0" * 64, "bytes": 1}}}, "it has no model.safetensors"),
        ({"files": ["config.json"]}, "files must be a mapping"),
        ({"more": 1}, "it must have the fields"),
    ],
)
def test_an_entry_that_is_not_as_it_must_be_is_refused(released, keys, message):
    reindex(released, **keys)
    with pytest.raises(ValueError, match=message):
        list_lenses(LONE)


def test_two_names_that_differ_in_capitals_alone_are_refused(released):
    files = json.loads(released.model(LONE).head.files["INDEX.json"].content)["lenses"]["lens"]["files"]
    reindex(released, files=files | {"Config.json": files["config.json"]})
    with pytest.raises(ValueError, match="one name where capitals do not count"):
        list_lenses(LONE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "holds no mapping"),
        (b'{"schema": "consistency-lens/2", "lenses": {}}', "has the schema 'consistency-lens/2', and"),
        (b'{"schema": "consistency-lens/1", "lenses": []}', "pass a repository of lenses, or update"),
        (b'{"schema": "consistency-lens/1", "lenses": {"x": 1}}', "it must have the fields"),
    ],
)
def test_an_index_that_is_none_is_refused(released, content, message):
    put(released, "INDEX.json", content, LONE)
    with pytest.raises(ValueError, match=message) as caught:
        list_lenses(LONE)
    assert "\n" not in str(caught.value)


def test_a_huge_index_is_not_fetched(released, monkeypatch):
    monkeypatch.setattr(index, "LARGEST_INDEX", 1000)
    released.requests.clear()
    with pytest.raises(ValueError, match="and at most 1,000 are read"):
        list_lenses(LONE)
    assert released.count("GET", "resolve") == 0


def test_an_index_is_read_as_it_was_written(released):
    entries = list_lenses(REPO).entries
    assert read_lens_index(index_text(entries), REPO) == entries
