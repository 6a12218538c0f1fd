"""What the checks of a pulled lens say of the code that came along, and of its base model."""

import json

import pytest
from published_small_lenses import write_lens
from pulled_lenses import BASE, LONE, TAG, kept, pull, put, reindex, released
from safetensors.torch import load_file, save_file
from tiny_lenses import tiny_lens, tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModel

from consistency_lens.data.cache_check import VerificationError
from consistency_lens.fingerprints import tokenizer_hash, weights_hash
from consistency_lens.hub import lens_pull
from consistency_lens.hub.lens_checks import verify_lens
from consistency_lens.hub.lens_push import push_lenses

__all__ = ["kept", "released"]


# Code


def test_code_that_comes_along_is_not_run_without_being_asked_for(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("MARKER", str(tmp_path / "ran"))
    lens = write_lens(tmp_path / "hostile", **BASE)
    evil = "import os\nopen(os.environ['MARKER'], 'w').close()\n"
    classes = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    staged = push_lenses(lens, LONE, tag=TAG, dry_run=True)
    files = {file.name: file.read_bytes() for file in staged.folder.iterdir()}
    config = json.loads(files["config.json"]) | {"auto_map": classes}
    files |= {"config.json": json.dumps(config).encode(), "evil.py": evil.encode()}
    listed = json.loads(files["INDEX.json"])
    repo = hub.add_repo("model", LONE, files)
    listed["lenses"]["lens"]["files"] = {
        name: {"sha256": repo.head.files[name].sha256, "bytes": len(content)}
        for name, content in files.items()
        if name != "INDEX.json"
    }
    put(hub, "INDEX.json", json.dumps(listed).encode(), LONE)
    repo.tags[TAG] = repo.head.oid
    (found,) = pull(tmp_path / "lens", LONE)
    checks = {check.name: check for check in verify_lens(found.path)}
    assert checks["code"].passed and "read them first" in checks["code"].detail
    for place in (str(found.path), LONE):
        assert type(AutoConfig.from_pretrained(place)).__module__.startswith("consistency_lens.")
        with pytest.raises(ValueError):
            AutoModel.from_pretrained(place)  # these weights are nobody's
    assert not (tmp_path / "ran").exists()


def test_code_of_another_repository_is_refused(released, tmp_path):
    config = json.loads(released.model(LONE).head.files["config.json"].content)
    content = json.dumps(config | {"auto_map": {"AutoModel": "evil/repo--code.Model"}}).encode()
    put(released, "config.json", content, LONE)
    files = json.loads(released.model(LONE).head.files["INDEX.json"].content)["lenses"]["lens"]["files"]
    digest = released.model(LONE).head.files["config.json"].sha256
    reindex(released, files=files | {"config.json": {"sha256": digest, "bytes": len(content)}})
    with pytest.raises(VerificationError, match="config.json names code of another repository .evil/repo--code.Model"):
        pull(tmp_path / "lens", LONE, revision="main")


# The base model


@pytest.fixture
def trained(tmp_path):
    """A lens that loads, and the folder of its base model."""
    base = tmp_path / "bases" / "tiny"
    model = tiny_model("llama")
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    lens = tiny_lens()
    for config in (lens.config.decoder, lens.config.encoder):
        config.base_model_name_or_path = str(base)
    hashes = {"weights_hash": weights_hash(model), "tokenizer_hash": tokenizer_hash(tiny_tokenizer())}
    lens.provenance = {"cache": {**hashes, "loaded_as": {"dtype": "float32"}}}
    lens.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained", base


def test_a_lens_is_compared_with_its_base_model(hub, trained, tmp_path):
    lens, base = trained
    assert all(check.passed for check in verify_lens(lens) if check.checked)
    push_lenses(lens, LONE, tag=TAG)
    (found,) = pull(tmp_path / "pulled", LONE)
    checks = verify_lens(found.path, str(base))
    assert all(check.passed for check in checks) and "loads" in {check.name for check in checks}
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    failed = [check.name for check in verify_lens(found.path, str(tmp_path / "other")) if not check.passed]
    assert failed == ["model weights", "loads"]


def test_a_base_model_that_is_here_and_another_is_found_at_the_pull(hub, trained, tmp_path, monkeypatch):
    lens, base = trained
    push_lenses(lens, LONE, tag=TAG)
    monkeypatch.chdir(base.parent)  # where ./tiny is the model
    pull(tmp_path / "right", LONE)
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "embed" in name)
    save_file(tensors | {name: tensors[name] + 1}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="model weights: hash .*, not "):
        pull(tmp_path / "wrong", LONE)
    assert not (tmp_path / "wrong").exists()
    monkeypatch.setattr(lens_pull, "CHEAP", 0)
    pull(tmp_path / "unasked", LONE)
    assert [check.name for check in verify_lens(tmp_path / "unasked") if not check.passed] == [
        "model weights",
        "loads",
    ]


def test_a_base_model_that_is_pickled_is_not_read_unasked(hub, trained, tmp_path, monkeypatch):
    lens, base = trained
    push_lenses(lens, LONE, tag=TAG)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    monkeypatch.chdir(base.parent)
    (found,) = pull(tmp_path / "pulled", LONE)
    (check,) = [check for check in verify_lens(found.path) if check.name == "model weights"]
    assert not check.checked and "not at hand" in check.detail
