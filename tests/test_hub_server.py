"""The Hub on loopback, through the real client: what the other tests rely on."""

import urllib.error
import urllib.request

import pytest
from hub_http import error
from hub_server import USER
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = f"{USER}/tiny"


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def folder(tmp_path):
    """A model's folder: a large file and small ones."""
    path = tmp_path / "model"
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_model_goes_up_and_loads_from_there(hub, api, folder):
    assert api.whoami()["name"] == USER
    api.create_repo(MODEL)
    api.create_repo(MODEL, exist_ok=True)
    commit = api.upload_folder(repo_id=MODEL, folder_path=folder, commit_message="a model")
    assert hub.model(MODEL).head.oid == commit.oid and hub.model(MODEL).head.title == "a model"
    assert [path for path, blob in hub.model(MODEL).head.files.items() if blob.is_large] == ["model.safetensors"]
    loaded, own = AutoModelForCausalLM.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(folder)
    assert all((loaded.state_dict()[name] == tensor).all() for name, tensor in own.state_dict().items())
    assert AutoTokenizer.from_pretrained(MODEL).get_vocab() == tiny_tokenizer().get_vocab()


def test_revisions_tags_and_history(hub, api, tmp_path):
    api.create_repo(MODEL)
    for number in range(2):
        api.upload_file(path_or_fileobj=f"text {number}".encode(), path_in_repo="notes/a.txt", repo_id=MODEL)
        api.create_tag(MODEL, tag=f"v{number}")
    api.create_branch(MODEL, branch="side/way")
    api.upload_file(path_or_fileobj=b"side", path_in_repo="b.txt", repo_id=MODEL, revision="side/way")
    for revision, text in (("v0", "text 0"), ("main", "text 1"), (hub.model(MODEL).tags["v0"], "text 0")):
        file = hf_hub_download(MODEL, "notes/a.txt", revision=revision)
        assert open(file).read() == text
    assert api.list_repo_files(MODEL, revision="side/way") == [".gitattributes", "b.txt", "notes/a.txt"]
    refs = api.list_repo_refs(MODEL)
    assert {branch.name for branch in refs.branches} == {"main", "side/way"}
    assert {tag.name for tag in refs.tags} == {"v0", "v1"}
    assert len(api.list_repo_commits(MODEL)) == len(hub.model(MODEL).commits)
    assert open(snapshot_download(MODEL, local_dir=tmp_path / "all") + "/notes/a.txt").read() == "text 1"
    assert [entry.path for entry in api.list_repo_tree(MODEL)] == [".gitattributes", "notes"]
    assert [entry.path for entry in api.get_paths_info(MODEL, ["notes", "notes/a.txt", "c"])] == [
        "notes/a.txt",
        "notes",
    ]


def test_nothing_new_makes_no_commit_and_what_is_known_is_not_sent_again(hub, api, folder):
    api.create_repo(MODEL)
    api.upload_folder(repo_id=MODEL, folder_path=folder)
    commits, sent = len(hub.model(MODEL).commits), hub.count("PUT", "/large/")
    assert sent == 1
    api.upload_folder(repo_id=MODEL, folder_path=folder)
    assert len(hub.model(MODEL).commits) == commits
    api.upload_folder(repo_id=MODEL, folder_path=folder, path_in_repo="copy")
    assert hub.count("PUT", "/large/") == sent and len(hub.model(MODEL).commits) == commits + 1
    api.delete_folder("copy", MODEL)
    assert not [path for path in hub.model(MODEL).head.files if path.startswith("copy/")]


def test_a_part_of_a_file(hub):
    hub.add_repo("dataset", "org/data", {"data/a.bin": bytes(range(100))})
    url = f"{hub.url}/datasets/org/data/resolve/main/data/a.bin"

    def ask(method="GET", **headers):
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=5)

    assert ask().read() == bytes(range(100))
    part = ask(Range="bytes=10-19")
    assert (part.status, part.read()) == (206, bytes(range(10, 20)))
    assert part.headers["Content-Range"] == "bytes 10-19/100"
    assert ask(Range="bytes=90-").read() == bytes(range(90, 100))
    with pytest.raises(urllib.error.HTTPError, match="416"):
        ask(Range="bytes=100-")
    head = ask("HEAD").headers
    assert head["X-Linked-Size"] == "100" and head["X-Repo-Commit"] == hub.dataset("org/data").head.oid


def test_what_is_not_there_or_not_allowed(hub, api, monkeypatch):
    hub.add_repo("model", "org/open", {"a.txt": b"a"})
    hub.add_repo("model", "org/closed", {"a.txt": b"a"}, private=True)
    assert api.model_info("org/closed").private
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/open", "b.txt")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/open", revision="nowhere")
    with pytest.raises(HfHubHTTPError, match="403.*no write access"):
        api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="org/open")
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.create_repo(MODEL)
        api.upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id=MODEL)
    hub.faults["GET", "/api/models/org/open"] = error(500, "", "down")
    with pytest.raises(HfHubHTTPError, match="500"):
        api.model_info("org/open")
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/closed")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami()
