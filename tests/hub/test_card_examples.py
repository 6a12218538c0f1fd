"""Every example in a card runs as it is written, against a Hub that has what the card is of."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
from carded_lenses import write_files
from code_blocks import run_card
from hub_rules import check_dataset_card, check_model_card
from hub_server import USER
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from published_caches import build_caches
from published_lenses import add_subject, save_subject
from tiny_lenses import tiny_lens

from consistency_lens.hub.cache_push import push_cache
from consistency_lens.hub.lens_card import write_lens_card
from consistency_lens.hub.lens_push import push_lenses

TEMPLATES = files("consistency_lens.hub").joinpath("templates")
# those whose examples run here, and those that run in tests/tuned_lens/test_download.py
HERE = {"lens_usage", "decoder_usage", "encoder_usage", "cache_card", "lens_collection_card"}
THERE = {"tuned_lens_card", "tuned_lens_dataset_card"}
BASE, LENS = f"{USER}/base", f"{USER}/lens"


def lens_of(base, commit=None):
    """A lens of a base model with LoRA, which has to load that model."""
    lens = tiny_lens(training="lora", revision=commit)
    for config in (lens.config.decoder, lens.config.encoder, lens.decoder.config, lens.encoder.config):
        config.base_model_name_or_path, config.base_model_revision = base, commit
    return lens


def publish(model, folder, repo):
    """Pushes a lens or a part of one, and its card; returns the card."""
    model.push_to_hub(repo)
    snapshot_download(repo, local_dir=folder)
    card = write_lens_card(write_files(folder), repo)
    HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
    check_model_card(card)
    return card.read_text(encoding="utf-8")


def test_the_templates_with_examples_are_those_that_are_tried():
    with_code = {path.name for path in TEMPLATES.iterdir() if re.search("```(?!bibtex)\\w", path.read_text())}
    assert with_code == {f"{name}.md.jinja" for name in HERE | THERE}


@pytest.fixture
def base(hub, tmp_path):
    """Folder and commit of a base model on the Hub."""
    folder = save_subject(tmp_path / "base")
    return folder, add_subject(hub, BASE, folder)


def test_the_examples_of_a_published_lens_run(base, tmp_path, capsys):
    lens = lens_of(BASE, base[1])
    first, *others = run_card(publish(lens, tmp_path / "lens", LENS))
    assert first["again"].shape == first["activations"].shape and len(first["words"]) == len(first["again"])
    assert len(capsys.readouterr().out.splitlines()) > 10
    for names in others:  # by the code that came with it
        assert names["lens"].decode(first["activations"]).texts == first["words"]


def test_the_examples_of_a_published_decoder_and_encoder_run(base, tmp_path):
    lens = lens_of(BASE, base[1])
    names, *_ = run_card(publish(lens.decoder, tmp_path / "decoder", f"{USER}/decoder"))
    assert names["ids"].shape == (len(names["tokens"]["input_ids"][0]), 4)
    names, *_ = run_card(publish(lens.encoder, tmp_path / "encoder", f"{USER}/encoder"))
    assert names["ids"].shape[0] == 1


def test_the_examples_of_a_lens_of_a_local_model_run_where_that_model_is(hub, tmp_path, monkeypatch):
    subject = save_subject(tmp_path / "path/of/mine")
    card = publish(lens_of(str(subject)), tmp_path / "lens", LENS)
    assert str(tmp_path) not in card and "The base model is local" in card
    monkeypatch.chdir(tmp_path)
    run_card(card)


def test_the_examples_of_a_cache_run(hub, tmp_path, monkeypatch):
    layer = build_caches(tmp_path).layer
    push_cache(layer, f"{USER}/cache", license="odc-by", progress=False)
    folder = snapshot_download(f"{USER}/cache", repo_type="dataset", local_dir=tmp_path / "pulled")
    head = check_dataset_card(tmp_path / "pulled" / "README.md")
    assert head["license"] == "odc-by"
    card = (tmp_path / "pulled" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (names,) = run_card(card)
    assert len(names["rows"]) == len(list(names["stream"])) > 0 and folder


def test_the_examples_of_a_collection_run(base, tmp_path, monkeypatch):
    lens = lens_of(BASE, base[1])
    for name in ("one", "two"):
        lens.save_pretrained(write_files(tmp_path / "all" / name))
    push_lenses(tmp_path / "all", f"{USER}/lenses")
    card = hf_hub_download(f"{USER}/lenses", "README.md")
    monkeypatch.chdir(tmp_path)
    (names,) = run_card(Path(card).read_text(encoding="utf-8"))
    pulled = tmp_path / "lenses" / "one" / "model.safetensors"
    assert pulled.read_bytes() == (tmp_path / "all" / "one" / "model.safetensors").read_bytes()
    assert names["lens"].config.layer == lens.config.layer
