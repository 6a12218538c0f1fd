"""Published lenses fetched from a Hub on loopback: equal to what was pushed, or nothing under the name."""

import pytest
from hub_faults import Fault
from pulled_lenses import LONE, NEXT, REPO, TAG, kept, left, names, pull, put, released
from waits import waits

from consistency_lens.hub.lens_checks import find_lenses, verify_lens
from consistency_lens.hub.lens_collection import list_lenses
from consistency_lens.hub.lens_index import index_text
from consistency_lens.hub_connection import HubError

__all__ = ["kept", "released", "waits"]


# What comes


def test_a_lone_lens_is_its_folder_with_its_index(released, tmp_path):
    (found,) = pull(tmp_path / "lens", LONE)
    repo = released.model(LONE)
    assert (found.name, found.path, found.commit, found.is_new) == ("lens", tmp_path / "lens", repo.head.oid, True)
    assert names(found.path) == repo.head.files.keys() - {".gitattributes"}
    for name in names(found.path):
        assert (found.path / name).read_bytes() == repo.head.files[name].content
    assert left(tmp_path) == [tmp_path / "lens"]


def test_one_of_a_collection_is_the_folder_and_all_are_a_folder_each(released, tmp_path):
    (found,) = pull(tmp_path / "mine", lens="two")
    assert (found.path, found.entry.kind) == (tmp_path / "mine", "consistency_lens_decoder")
    assert "config.json" in names(tmp_path / "mine") and "INDEX.json" in names(tmp_path / "mine")
    found = pull(tmp_path / "all")
    assert {lens.name: lens.path for lens in found} == {name: tmp_path / "all" / name for name in ("one", "two")}
    assert find_lenses(tmp_path / "all") == [tmp_path / "all" / "one", tmp_path / "all" / "two"]
    for path in (tmp_path / "mine", tmp_path / "all" / "one", tmp_path / "all" / "two"):
        checks = verify_lens(path)
        assert [check.name for check in checks if not check.passed] == ["model weights"]
        assert {check.name for check in checks} >= {"checksums", "index", "besides", "weights", "code"}
    assert pull(tmp_path / "all", revision=NEXT)[0].is_new is False
    assert pull(tmp_path / "mine", lens="two")[0].is_new is False


def test_a_revision_is_that_of_its_time(released, tmp_path):
    (old,) = pull(tmp_path / "old", lens="one", revision=TAG)
    (new,) = pull(tmp_path / "new", lens="one")
    assert (old.entry.metrics["fve"], new.entry.metrics["fve"]) == (0.5, 0.9)
    assert old.commit == released.model(REPO).tags[TAG]
    with pytest.raises(ValueError, match="holds something else; choose another folder"):
        pull(tmp_path / "old", lens="one")
    with pytest.raises(ValueError, match=f"lens: '{REPO}' has one, two, not 'three'"):
        pull(tmp_path / "x", lens="three")
    with pytest.raises(ValueError, match=f"revision: '{REPO}' has no 'v1999.01.01'"):
        pull(tmp_path / "x", revision="v1999.01.01")


def test_what_a_training_has_pushed_since_the_last_release_is_not_taken(released, tmp_path):
    trained = put(released, "metrics.json", b'{"fve": 0.9}', REPO).oid
    tags = released.model(REPO).tags
    found = list_lenses(REPO)
    assert (found.commit, found.later, found.unfinished) == (tags[NEXT], trained, None)
    assert {lens.commit for lens in pull(tmp_path / "all")} == {tags[NEXT]}
    on_main = list_lenses(REPO, "main")
    assert (on_main.commit, on_main.later) == (trained, None)


def test_a_release_of_an_earlier_day_that_main_is_at_is_taken(released):
    repo = released.model(LONE)
    repo.tags[NEXT] = repo.commits[0].oid
    assert (list_lenses(LONE).commit, list_lenses(LONE).later) == (repo.head.oid, None)


def test_a_repository_with_no_release_at_all_is_told(released):
    released.model(LONE).tags.clear()
    put(released, "metrics.json", b"{}", LONE)
    with pytest.raises(ValueError, match=f"the release {TAG} of '{LONE}' is not finished, it has no tag; push it"):
        list_lenses(LONE)
    put(released, "INDEX.json", index_text({}).encode(), LONE)
    with pytest.raises(ValueError, match=f"'{LONE}' has no release, and its INDEX.json names no lenses; push one"):
        list_lenses(LONE)


def test_a_private_lens_needs_its_owners_token(released, tmp_path, monkeypatch):
    released.model(LONE).private = True
    pull(tmp_path / "mine", LONE)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with pytest.raises(ValueError, match="or it is private; check the name, or log in"):
        pull(tmp_path / "theirs", LONE)


def test_repositories_without_an_index_hold_no_lenses(hub, tmp_path):
    hub.add_repo("model", "org/other", {"config.json": b"{}"})
    with pytest.raises(ValueError, match="'org/other' holds no lenses .no INDEX.json.; pass one that does"):
        pull(tmp_path / "x", "org/other")


# Pulls that were stopped


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks that are written as they come; of one of 10 MB a small file's beginning would be lost."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 8)


def test_a_connection_that_is_cut_is_taken_up_in_the_middle_of_the_file(released, tmp_path, waits, small_chunks):
    size = len(released.model(LONE).head.files["model.safetensors"].content)
    released.plan(Fault.CUT, "GET", "model.safetensors")
    pull(tmp_path / "lens", LONE)
    assert released.ranges == [f"bytes={size // 2}-"] and waits == [1]


def test_the_next_pull_goes_on_in_the_middle_of_the_file(released, tmp_path, waits, small_chunks):
    size = len(released.model(LONE).head.files["model.safetensors"].content)
    released.plan(Fault.CUT, "GET", "model.safetensors")
    released.plan(Fault.ERROR, "GET", "model.safetensors", first=1)
    with pytest.raises(HubError, match="fails or cannot be reached.*try again later"):
        pull(tmp_path / "lens", LONE)
    assert not (tmp_path / "lens").exists()
    assert find_lenses(tmp_path) == []  # what is there has a hidden name
    released.requests.clear()
    released.ranges.clear()
    pull(tmp_path / "lens", LONE)
    assert released.ranges == [f"bytes={size // 2}-"] and released.count("GET", "/config.json") == 0
    assert left(tmp_path) == [tmp_path / "lens"]


def test_a_wait_that_the_hub_asks_for_is_kept_and_an_endless_one_is_not(released, tmp_path, waits):
    released.plan(Fault.BUSY, "GET", "model.safetensors", times=2)
    released.retry_after = 7
    pull(tmp_path / "lens", LONE)
    assert waits == [8, 8]
    released.plan(Fault.BUSY, "GET", "model.safetensors", times=99)
    released.retry_after = 100_000
    with pytest.raises(HubError, match="asks to wait for 100,000 seconds .429.; try again then"):
        pull(tmp_path / "other", LONE)
    assert waits == [8, 8] and not (tmp_path / "other").exists()


def test_a_hub_that_stays_busy_is_given_up(released, tmp_path, waits):
    released.plan(Fault.BUSY, "GET", "model.safetensors", times=99)
    with pytest.raises(HubError, match="fails or cannot be reached"):
        pull(tmp_path / "lens", LONE)
    assert len(waits) == 5


@pytest.mark.parametrize("name", ["/api/models/user/lens$", "model.safetensors"])
def test_silence_is_waited_for_up_to_a_limit(released, tmp_path, waits, monkeypatch, name):
    monkeypatch.setattr("consistency_lens.hub_connection.PATIENCE", 0.05)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    released.slowness = 0.5
    released.plan(Fault.SLOW, "GET", name, times=99)
    with pytest.raises(HubError, match="fails or cannot be reached .*timed out"):
        pull(tmp_path / "lens", LONE)
