"""Artifacts on a Hub on loopback, by the real client: what goes up, and how it is asked for."""

import json

import pytest
import torch
from hub_server import ORGANISATION, TOKEN
from published_lenses import add_subject, save_subject
from safetensors.torch import save_file
from tiny_lenses import activations, disturb, tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoModel

from consistency_lens import ConsistencyLensModel, LensDecoder, TunedLens
from consistency_lens.remote_code import remote_code

SUBJECT, REPO, TEXT = "org/tiny", "user/lens", "w3 w9 w27 w5"
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def subject_folder(tmp_path_factory):
    return save_subject(tmp_path_factory.mktemp("subject"))


@pytest.fixture
def commit(hub, subject_folder):
    """Of the subject on the Hub, which has moved on since."""
    commit = add_subject(hub, SUBJECT, subject_folder)
    hub.model(SUBJECT).commit("main", "other weights", {})
    return commit


def new_lens(commit, training="frozen", name=SUBJECT):
    subject = tiny_model("llama")
    subject.config.name_or_path = name
    lens = ConsistencyLensModel.from_subject(
        subject, tiny_tokenizer(), 1, num_text_tokens=4, training=training, revision=commit,
        lora=LORA if training == "lora" else None,
    )  # fmt: skip
    lens.set_statistics(torch.linspace(-1, 1, 32), 1.7)
    lens.provenance = {"training": training}
    return disturb(lens).eval()


def new_tuned_lens(commit):
    subject = tiny_model("llama")
    subject.config.name_or_path = SUBJECT
    lens = TunedLens.for_model(subject, tiny_tokenizer(), revision=commit)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.add_(0.1)
    return lens


def contents(hub, repo=REPO):
    return {path: blob.content for path, blob in hub.model(repo).head.files.items() if path != ".gitattributes"}


def saved(model, folder):
    model.save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def in_subfolder(hub, model, folder, tmp_path):
    files = {f"{folder}/{name}": content for name, content in saved(model, tmp_path / "saved").items()}
    hub.add_repo("model", REPO, files)


# Round trips


@pytest.mark.parametrize("training", ["frozen", "full", "lora"])
def test_a_lens_comes_back_as_it_was(hub, commit, training, tmp_path):
    lens = new_lens(commit, training)
    pushed = lens.push_to_hub(REPO)
    files, local = contents(hub), saved(lens, tmp_path / "saved")
    assert pushed.oid == hub.model(REPO).head.oid and hub.model(REPO).head.title == "Upload ConsistencyLensModel"
    same = local.keys() - {"config.json"}
    assert same == {"model.safetensors", "provenance.json", "tokenizer.json", "tokenizer_config.json"}
    assert {name: files[name] for name in same} == {name: local[name] for name in same}
    assert files.keys() == local.keys() | remote_code(ConsistencyLensModel).keys() | {"README.md"}
    loaded = AutoModel.from_pretrained(REPO)
    assert str(loaded.explain(TEXT)) == str(lens.explain(TEXT))
    assert loaded.provenance == lens.provenance
    assert type(AutoModel.from_pretrained(REPO, trust_remote_code=True)) is ConsistencyLensModel, "the installed one"
    assert saved(loaded, tmp_path / "again") == local


@pytest.mark.parametrize("training", ["full", "lora"])
def test_decoder_and_encoder_come_back_as_they_were(hub, commit, training):
    lens = new_lens(commit, training)
    lens.decoder.push_to_hub("user/decoder")
    lens.encoder.push_to_hub("user/encoder")
    decoder, encoder = (AutoModel.from_pretrained(f"user/{name}") for name in ("decoder", "encoder"))
    ids = decoder.generate_ids(activations(), None, 4)
    assert torch.equal(ids, lens.decoder.generate_ids(activations(), None, 4))
    assert torch.equal(encoder(encoder.embed_ids(ids)), lens.encoder(lens.encoder.embed_ids(ids)))


def test_a_tuned_lens_comes_back_as_it_was(hub, commit, tmp_path):
    lens = new_tuned_lens(commit)
    lens.push_to_hub(REPO)
    loaded = AutoModel.from_pretrained(REPO)
    assert torch.equal(loaded.trajectory(TEXT).tuned, lens.trajectory(TEXT).tuned)
    assert saved(loaded, tmp_path / "again") == saved(lens, tmp_path / "saved")


# What users of transformers know


@pytest.mark.parametrize("make", [new_lens, lambda commit: new_lens(commit).decoder, new_tuned_lens])
def test_a_token_opens_the_artifact_and_its_subject(hub, commit, make, monkeypatch, tmp_path):
    make(commit).push_to_hub(REPO, private=True)
    assert hub.model(REPO).private
    hub.model(SUBJECT).private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="user/lens is not a local folder"):
        AutoModel.from_pretrained(REPO)
    loaded = AutoModel.from_pretrained(REPO, token=TOKEN, cache_dir=tmp_path / "cache")
    assert subject_of(loaded).config.name_or_path == SUBJECT
    assert TOKEN.encode() not in b"".join(saved(loaded, tmp_path / "saved").values())
    assert {folder.name for folder in (tmp_path / "cache").glob("models--*")} == {
        "models--user--lens", "models--org--tiny",
    }  # fmt: skip


def subject_of(loaded):
    if isinstance(loaded, LensDecoder):
        return loaded.base
    return loaded.subject_model if isinstance(loaded, TunedLens) else loaded.subject.model


def test_a_private_subject_without_token_is_told(hub, commit, monkeypatch):
    new_lens(commit).push_to_hub(REPO)
    hub.model(SUBJECT).private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        ValueError, match=f"no model at 'org/tiny' .revision {commit}.; pass base_model=.* or the token"
    ):
        AutoModel.from_pretrained(REPO)


def test_the_revision_is_the_artifacts_and_the_config_pins_the_subjects(hub, commit):
    lens = new_lens(commit)
    first = lens.push_to_hub(REPO).oid
    lens.set_statistics(torch.zeros(32), 5.0)
    lens.push_to_hub(REPO, revision="wider", commit_message="A wider RMS")
    assert hub.model(REPO).branches["main"] == first
    assert hub.model(REPO).at("wider").title == "A wider RMS"
    read = {revision: AutoModel.from_pretrained(REPO, revision=revision).rms.item() for revision in (first, "wider")}
    assert read == pytest.approx({first: 1.7, "wider": 5.0})


def test_all_files_come_from_one_commit(hub, commit, monkeypatch):
    lens = new_lens(commit)
    lens.push_to_hub(REPO)
    commits = []

    def load(path):  # somebody pushes while it loads
        if not commits:
            lens.provenance = {"training": "later"}
            commits.append(lens.push_to_hub(REPO))
        return original(path)

    from consistency_lens import lens_artifact

    original = lens_artifact.load_file
    monkeypatch.setattr(lens_artifact, "load_file", load)
    assert ConsistencyLensModel.from_pretrained(REPO).provenance == {"training": "frozen"}


def test_everything_lies_in_the_subfolder(hub, commit, tmp_path):
    lens = new_lens(commit)
    in_subfolder(hub, lens, "layers/1", tmp_path)
    loaded = AutoModel.from_pretrained(REPO, subfolder="layers/1")
    assert str(loaded.explain(TEXT)) == str(lens.explain(TEXT))
    assert loaded.provenance == lens.provenance
    assert loaded.tokenizer.get_vocab() == lens.tokenizer.get_vocab()


def test_what_is_cached_loads_without_the_hub(hub, commit, tmp_path):
    lens = new_lens(commit, "lora")
    lens.provenance = None
    lens.push_to_hub(REPO)
    cache = {"cache_dir": str(tmp_path / "cache")}
    AutoModel.from_pretrained(REPO, **cache)
    asked = len(hub.requests)
    loaded = AutoModel.from_pretrained(REPO, local_files_only=True, **cache)
    assert str(loaded.explain(TEXT)) == str(lens.explain(TEXT))
    assert len(hub.requests) == asked
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        AutoModel.from_pretrained(REPO, local_files_only=True)
    AutoModel.from_pretrained(REPO, force_download=True, **cache)
    assert hub.count("GET", "lens/resolve/.*/model.safetensors") == 2
    assert hub.count("GET", "tiny/resolve/.*/model.safetensors") == 1, "the subject is pinned, and here"


def test_precision_and_place_are_the_subjects(hub, commit):
    new_lens(commit).push_to_hub(REPO)
    loaded = AutoModel.from_pretrained(REPO, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager")
    base = loaded.decoder.base
    assert base.dtype == torch.bfloat16 and base.config._attn_implementation == "eager"
    assert loaded.decoder.projection.weight.dtype == torch.float32
    assert loaded.explain(TEXT)[0].text


def test_what_is_not_there_is_told(hub, commit):
    with pytest.raises(OSError, match="user/none is not a local folder and is not a valid model identifier"):
        AutoModel.from_pretrained("user/none")
    new_lens(commit).push_to_hub(REPO)
    del hub.model(REPO).head.files["model.safetensors"]
    with pytest.raises(OSError, match=r"user/lens does not appear to have a file named model.safetensors"):
        AutoModel.from_pretrained(REPO)
    with pytest.raises(TypeError, match="no argument 'base_modell'"):
        AutoModel.from_pretrained(REPO, base_modell="x")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_broken_is_told(hub, commit, name, tmp_path):
    new_lens(commit).save_pretrained(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match="artifact: the tokenizer in .* is broken .*; fetch it anew"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("half", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"])
def test_weights_that_are_not_whole_are_told(hub, commit, half, tmp_path):
    new_lens(commit).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(half)
    with pytest.raises(ValueError, match="model.safetensors' holds no whole weights .*; it was cut off, or"):
        AutoModel.from_pretrained(tmp_path)


# Pushing


def test_only_what_belongs_to_the_artifact_is_pushed(hub, commit, tmp_path):
    folder = tmp_path / "run"
    for place in ("data/corpus.parquet", "checkpoint-3/model.safetensors", "outputs/secret.txt", "notes.txt"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(b"x")
    (folder / "training_args.bin").write_bytes(b"pickle")
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    (folder / "README.md").write_text("---\ntags: []\n---\n# Mine\n")
    (folder / "LICENSE").symlink_to("/etc/hostname")
    lens = new_lens(commit)
    lens.provenance = {"recipe": {"dataset": f"{tmp_path}/texts/corpus.txt", "model": SUBJECT}}
    lens.save_pretrained(folder, push_to_hub=True, repo_id=REPO, commit_message="All of it")
    files = contents(hub)
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "provenance.json"}
    assert files.keys() - remote_code(ConsistencyLensModel).keys() == expected | {"README.md"}
    assert files["README.md"] == (folder / "README.md").read_bytes()
    assert json.loads(files["provenance.json"])["recipe"] == {"dataset": "corpus.txt", "model": SUBJECT}
    assert hub.model(REPO).head.title == "All of it"
    assert "auto_map" in json.loads(files["config.json"])
    assert "auto_map" not in json.loads((folder / "config.json").read_text()), "it has no code beside it"


def test_a_subject_in_a_folder_is_not_taken_for_one_on_the_hub(hub, subject_folder, tmp_path, monkeypatch):
    lens = new_lens(None, name=str(subject_folder))
    lens.push_to_hub(REPO)
    files = contents(hub)
    assert str(tmp_path.parent) not in files["config.json"].decode()
    name = json.loads(files["config.json"])["decoder"]["base_model_name_or_path"]
    assert name == f"./{subject_folder.name}"
    with pytest.raises(ValueError, match=f"no model at '{name}' .*pass base_model="):
        AutoModel.from_pretrained(REPO)
    loaded = AutoModel.from_pretrained(REPO, base_model=str(subject_folder))
    assert str(loaded.explain(TEXT)) == str(lens.explain(TEXT))
    assert 'base_model="<folder of that model>"' in files["README.md"].decode()


def test_cards_are_kept_tagged_or_short(hub, commit):
    lens = new_lens(commit)
    lens.push_to_hub(REPO, tags=["mine"])
    card = contents(hub)["README.md"].decode()
    assert "base_model: org/tiny" in card and "- consistency-lens\n- interpretability\n- mine\n" in card
    assert f'AutoModel.from_pretrained("{REPO}")' in card
    lens.push_to_hub(REPO, card="---\ntags: [own]\n---\n# My own\n")
    lens.push_to_hub(REPO, tags=["new"])
    assert contents(hub)["README.md"].decode() == "---\ntags:\n- own\n- new\n---\n# My own\n"


def test_organisations_pull_requests_and_names_without_a_user(hub, commit):
    lens = new_lens(commit)
    assert lens.push_to_hub("lens").repo_url.repo_id == REPO
    lens.push_to_hub(f"{ORGANISATION}/lens")
    assert "model.safetensors" in contents(hub, f"{ORGANISATION}/lens")
    before = hub.model(REPO).head.oid
    pushed = lens.push_to_hub(REPO, create_pr=True, tags=["x"])
    assert pushed.pr_url.endswith("/discussions/1") and hub.model(REPO).head.oid == before


def test_mistakes_are_one_line_without_the_token(hub, commit, monkeypatch):
    lens = new_lens(commit)
    with pytest.raises(ValueError, match="hub: the token has no right to do that in 'somebody/lens'") as told:
        lens.push_to_hub("somebody/lens", token=TOKEN)
    assert TOKEN not in str(told.value)
    with pytest.raises(ValueError, match="does not take the token") as told:
        lens.push_to_hub(REPO, token="hf_planted")
    assert "planted" not in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(TypeError, match="repo_id goes with push_to_hub=True"):
        lens.save_pretrained("nowhere", repo_id=REPO)
    with torch.no_grad():
        lens.decoder.projection.bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        lens.push_to_hub("user/broken")
    assert ("model", "user/broken") not in hub.repos
