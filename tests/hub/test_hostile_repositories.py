"""What others put into a repository to reach beyond it, to break its reader or to write to a terminal; and tokens."""

import json

import pytest
from hub_repositories import Blob
from hub_server import TOKEN
from published_caches import build_caches
from published_small_lenses import write_lens

from consistency_lens import ConsistencyLensModel
from consistency_lens.data.cache_check import VerificationError
from consistency_lens.hub.cache_pull import pull_cache
from consistency_lens.hub.cache_push import push_cache
from consistency_lens.hub.download import FileRecord, Snapshot, fetch_checked
from consistency_lens.hub.lens_index import read_lens_index
from consistency_lens.hub.lens_pull import pull_lenses
from consistency_lens.hub.lens_push import push_lenses
from consistency_lens.hub_upload import check_no_token, commit_folder, create_repo
from consistency_lens.tuned_lens.index import GATES, NEEDED, read_index

LENS, CACHE, TAG = "user/lens", "user/cache", "v2026.01.31"
DEEP = b"[" * 100_000  # more than a parser goes into


# Caches


@pytest.fixture(scope="module")
def published_cache(tmp_path_factory):
    """The files that a push of caches uploads, by name."""
    built = build_caches(tmp_path_factory.mktemp("caches"))
    folder = push_cache(built.layer, CACHE, dry_run=True, progress=False).folder
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_checksum_that_is_a_path_changes_no_file(hub, published_cache, tmp_path, is_absolute):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    digest = str(mine) if is_absolute else "../../../mine.txt"
    provenance = json.loads(published_cache["provenance/train.json"])
    provenance["parquet"][0]["sha256"] = digest
    hub.add_repo("dataset", CACHE, published_cache | {"provenance/train.json": json.dumps(provenance).encode()})
    with pytest.raises(ValueError, match="names no parquet files of a cache"):
        pull_cache(CACHE, tmp_path / "pulled", split="train", progress=False)
    source = Snapshot(CACHE, hub.dataset(CACHE).head.oid, "dataset")
    with pytest.raises(ValueError, match="the checksum of .gitattributes .* is no sha256"):
        fetch_checked(source, ".gitattributes", FileRecord(digest), tmp_path / "a" / "b")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    "content",
    [
        b"[]", b"{", b"\xff", DEEP, b'{"parquet": 1}', b'{"parquet": [1]}', b'{"parquet": [{"file": 1}]}',
        {"width": None}, {"width": 2**70}, {"layer": "../x"}, {"rows": -1}, {"dtype": "object"},
    ],
)  # fmt: skip
def test_a_provenance_of_a_cache_that_is_none_is_told(hub, published_cache, tmp_path, content):
    if isinstance(content, dict):
        content = json.dumps(json.loads(published_cache["provenance/train.json"]) | content).encode()
    hub.add_repo("dataset", CACHE, published_cache | {"provenance/train.json": content})
    with pytest.raises(ValueError, match=f"repo: provenance/train.json of '{CACHE}' .*; publish it anew") as caught:
        pull_cache(CACHE, tmp_path / "pulled", split="train", progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "pulled").exists()


# Lenses


@pytest.fixture
def release(hub, tmp_path):
    """Publishes a lens some of whose files are others, with an index that has their checksums."""

    def made(**files):
        lens = write_lens(tmp_path / "made", base="somewhere", revision=None)
        staged = push_lenses(lens, LENS, tag=TAG, dry_run=True).folder
        contents = {file.name: file.read_bytes() for file in staged.iterdir()} | files
        index = json.loads(contents.pop("INDEX.json"))
        index["lenses"]["lens"]["files"] = {
            name: {"sha256": Blob(content, False).sha256, "bytes": len(content)} for name, content in contents.items()
        }
        repo = hub.add_repo("model", LENS, contents | {"INDEX.json": json.dumps(index).encode()})
        repo.tags[TAG] = repo.head.oid
        return index

    return made


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("provenance.json", b"[]"),
        ("provenance.json", b'{"cache": null}'),
        ("provenance.json", DEEP),
        ("config.json", DEEP),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": []}'),
        ("tokenizer_config.json", DEEP),
        ("metrics.json", b"[]"),
        ("samples.jsonl", b"1\n"),
        ("run.json", b"3"),
        ("model.safetensors", b"\x80\x04K\x01."),
    ],
)
def test_a_file_of_a_lens_that_is_not_as_it_must_be_is_told(release, tmp_path, name, content):
    release(**{name: content})
    with pytest.raises(VerificationError, match="lens: 'lens' does not pass verification") as caught:
        pull_lenses(LENS, tmp_path / "pulled", progress=False)
    assert "\n" not in str(caught.value) and list(tmp_path.glob("*pulled*")) == []


@pytest.mark.parametrize("base", [3, ["x"], "../../secret"])
def test_a_base_model_that_is_no_name_or_not_that_of_the_index_is_told(release, tmp_path, base):
    config = json.loads((write_lens(tmp_path / "other", base="x", revision=None) / "config.json").read_text())
    for part in ("decoder", "encoder"):
        config[part]["base_model_name_or_path"] = base
    release(**{"config.json": json.dumps(config).encode()})
    with pytest.raises(VerificationError, match="base model") as caught:
        pull_lenses(LENS, tmp_path / "pulled", progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": []}, {"kind": None}, {"metrics": {"fve": 10**400}}, {"layer": 10**400}, {"path": ["x"]},
        {"release": 3}, {"license": "\x1b[2J"}, {"package_version": "\x1b]0;x\x07"},
        {"base_model": {"name": "\x1b[2Jx", "revision": None, "weights_hash": None}},
        {"base_model": {"name": "a\nb", "revision": None, "weights_hash": None}},
    ],
)  # fmt: skip
def test_an_entry_that_would_break_its_reader_or_write_to_a_terminal_is_told(release, keys):
    index = release()
    read_lens_index(json.dumps(index), LENS)
    index["lenses"]["lens"] |= keys
    with pytest.raises(ValueError, match="'lens': .*; pass another revision") as caught:
        read_lens_index(json.dumps(index), LENS)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"model_commit": 3}, {"license": []}, {"license": "\x1b[2J"}, {"tokenizer_commit": {}}, {"path": []},
        {"acceptance": {"gate_A": 1}}, {"tl_version": []}, {"sha256": dict.fromkeys(NEEDED, "../x")},
    ],
)  # fmt: skip
def test_so_is_an_entry_of_a_tuned_lens(keys):
    entry = {
        "path": "tuned_lenses/org/m", "sha256": dict.fromkeys(NEEDED, "0" * 64), "tl_version": TAG,
        "model_commit": None, "tokenizer_commit": None, "acceptance": dict.fromkeys(GATES, True), "license": None,
        "licenses": {},
    }  # fmt: skip
    assert read_index(json.dumps({"org/m": entry}), LENS)["org/m"].release == TAG
    with pytest.raises(ValueError, match="'org/m': .*; pass another revision"):
        read_index(json.dumps({"org/m": entry | keys}), LENS)


# Tokens


@pytest.mark.parametrize("token", [f"{TOKEN}\n", f"{TOKEN}é", f"a {TOKEN}"])
@pytest.mark.parametrize("call", [create_repo, ConsistencyLensModel.from_pretrained])
def test_a_token_that_cannot_be_sent_is_in_no_message(hub, call, token):
    with pytest.raises(ValueError, match="token: it has white space or other signs .*; strip it") as caught:
        call(LENS, token=token)
    assert TOKEN not in str(caught.value) and caught.value.__context__ is None
    assert hub.requests == []


def test_a_token_in_a_file_stops_every_push(hub, tmp_path):
    (tmp_path / "card.md").write_text(f"my {TOKEN}")
    with pytest.raises(ValueError, match="a token of the Hub stands in 'card.md'") as caught:
        commit_folder(tmp_path, LENS, commit_message="x")
    assert TOKEN not in str(caught.value) and hub.requests == []


def test_a_token_of_a_letter_does_not_stand_in_every_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x")
    (tmp_path / "card.md").write_text("an example")
    check_no_token(tmp_path)
