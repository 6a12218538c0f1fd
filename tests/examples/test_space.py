"""The Gradio Space: what it shows of a text, its mistakes, and its metadata."""

import importlib.util
from pathlib import Path

import pytest
from huggingface_hub import metadata_load
from tiny_lenses import disturb, tiny_lens

SPACE = Path(__file__).parents[2] / "examples" / "space"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lens():
    return disturb(tiny_lens())


def test_each_token_has_its_colour_and_its_row(app, lens):
    coloured, rows = app.read(lens, "w9 w10 w11")
    expected = lens.explain("w9 w10 w11")
    assert [token for token, _ in coloured] == ["w9", "w10", "w11"]
    assert all(0 <= share <= 1 for _, share in coloured)
    assert [row[1] for row in rows] == [token.text.strip() for token in expected]
    assert all(len(row) == len(app.COLUMNS) for row in rows)


def test_a_text_that_is_empty_or_too_long_is_refused(app, lens):
    with pytest.raises(ValueError, match="empty text"):
        app.read(lens, "")
    with pytest.raises(ValueError, match="the text has 1001 characters; up to 1000 are read"):
        app.read(lens, "w" * 1001)


def test_the_lens_is_the_one_that_the_settings_name(app, monkeypatch):
    monkeypatch.setattr(app.AutoModel, "from_pretrained", lambda name, revision: (name, revision))
    monkeypatch.setenv("LENS", "user/lens")
    assert app.load_lens() == ("user/lens", None)
    monkeypatch.setenv("LENS_REVISION", "v2026.01.31")
    assert app.load_lens() == ("user/lens", "v2026.01.31")
    monkeypatch.delenv("LENS")
    with pytest.raises(ValueError, match="LENS: not set"):
        app.load_lens()


def test_the_page_is_built(app, lens):
    pytest.importorskip("gradio", reason="gradio is installed in a Space, not for the tests")
    assert app.build(lens).title == "A consistency lens"


def test_the_metadata_are_those_of_a_space():
    head = metadata_load(SPACE / "README.md")
    assert head["sdk"] == "gradio" and (SPACE / head["app_file"]).is_file()
    assert len(head["short_description"]) <= 60 and head["license"] == "apache-2.0"
    assert {"consistency-lens", "gradio"} <= set((SPACE / "requirements.txt").read_text().split())
