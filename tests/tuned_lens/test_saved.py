"""A saved lens is laid over the model that it was fitted to, at the commit that it was fitted at."""

import pytest
from hub_repositories import Blob
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.tuned_lens.lens_places import clean_name
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.saved import check_opened, open_lens

MODEL = "me/tiny"


@pytest.fixture
def repo(hub, tmp_path):
    """A model on the Hub with two commits, of other weights each."""
    for seed in (0, 1):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / f"tiny{seed}")
        tiny_tokenizer().save_pretrained(tmp_path / f"tiny{seed}")
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / f"tiny{seed}").iterdir()} for seed in (0, 1)
    )
    repo = hub.add_repo("model", MODEL, first)
    repo.commit("main", "other weights", {name: Blob(content, False) for name, content in second.items()})
    return repo


@pytest.fixture
def saved(repo, tmp_path):
    """A lens that was fitted at the first commit."""
    lens = TunedLens.for_model(tiny_model("llama"), revision=repo.commits[0].oid)
    lens.config.base_model_name_or_path = MODEL
    lens.save_pretrained(tmp_path / "lens")
    return tmp_path / "lens"


@pytest.mark.parametrize("model", [None, MODEL])
def test_the_model_is_read_at_the_commit_of_the_fit(repo, saved, model):
    opened = open_lens(saved, model, device="cpu")
    assert opened.model == MODEL and opened.revision == repo.commits[0].oid != repo.head.oid
    weight = opened.subject.get_output_embeddings().weight
    assert weight.equal(tiny_model("llama", seed=0).get_output_embeddings().weight)
    assert opened.lens.subject_model is opened.subject
    assert opened.lens.tokenizer is opened.tokenizer


@pytest.mark.parametrize("model", [None, MODEL])
def test_at_the_commit_of_the_fit_the_model_is_known_in_any_precision(repo, saved, tmp_path, model):
    check_opened(open_lens(saved, model, dtype="bfloat16", device="cpu"), is_named=model is not None)
    elsewhere = open_lens(saved, str(tmp_path / "tiny0"), dtype="bfloat16", device="cpu")
    with pytest.raises(ValueError, match="tiny0' was not compared with the model that the lens was made for"):
        check_opened(elsewhere, is_named=True)


def test_another_commit_is_refused(repo, saved):
    with pytest.raises(ValueError, match=f"is at {repo.head.oid}, the lens .* was fitted at {repo.commits[0].oid}"):
        open_lens(saved, MODEL, revision="main", device="cpu")


def test_without_a_lens_the_model_is_read_alone(repo):
    opened = open_lens(None, MODEL, device="cpu")
    assert opened.lens is None and opened.revision == repo.head.oid
    with pytest.raises(ValueError, match="model: got none"):
        open_lens(None)


def test_a_model_that_was_saved_without_its_head_is_refused(tmp_path):
    tiny_model("llama", tie_word_embeddings=False).model.save_pretrained(tmp_path / "headless")
    tiny_tokenizer().save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="model: .*headless' was saved without its head, as LlamaModel; pass a"):
        open_lens(None, str(tmp_path / "headless"), device="cpu")


def test_clean_names_are_the_last_part(tmp_path, monkeypatch):
    folder = tmp_path / "some" / "model"
    folder.mkdir(parents=True)
    names = ["mistralai/Mistral-7B-v0.1", "gpt2", "org/gpt2/", str(folder), f"{folder}/"]
    assert [clean_name(name) for name in names] == ["Mistral-7B-v0.1", "gpt2", "gpt2", "model", "model"]
    monkeypatch.chdir(folder)
    assert clean_name(".") == "model"
