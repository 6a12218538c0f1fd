"""Names and folders of tuned lenses, and what a folder is taken for."""

import pytest

from consistency_lens.tuned_lens.lens_places import clean_name, default_folder, is_foreign, is_lens, is_own

OWN = '{"model_type": "consistency_lens_tuned"}'


def test_a_clean_name_is_the_last_part(tmp_path, monkeypatch):
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "some" / "model")
    names = ["mistralai/Mistral-7B-v0.1", "gpt2", "me/tiny/", str(tmp_path / "some"), f"{tmp_path}/some/", "."]
    assert [clean_name(name) for name in names] == ["Mistral-7B-v0.1", "gpt2", "tiny", "some", "some", "model"]
    assert str(default_folder("me/tiny")) == "tuned_lenses/tiny"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, (False, False, False)),
        ({"config.json": OWN}, (False, False, True)),
        ({"config.json": OWN, "model.safetensors": ""}, (True, False, True)),
        ({"config.json": "{}", "params.pt": ""}, (True, True, False)),
        ({"params.pt": ""}, (False, True, False)),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors": ""}, (True, False, False)),
        ({"config.json": "no JSON"}, (False, False, False)),
        ({"config.json": "[]"}, (False, False, False)),
    ],
)
def test_what_a_folder_is_taken_for(tmp_path, files, found):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert (is_lens(tmp_path), is_foreign(tmp_path), is_own(tmp_path)) == found
