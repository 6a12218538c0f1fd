"""`consistency-lens plot`: one file for each plot that a run has the figures for."""

import json
from pathlib import Path

import pytest

from consistency_lens.cli.main import main
from consistency_lens.plots.files import PLOTS, SCRIPT

MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture
def log(tmp_path):
    """A folder with nothing but a log."""
    entries = [{"step": step, "ce": 1 / step} for step in (1, 2, 3)]
    (tmp_path / "log_history.json").write_text(json.dumps(entries))
    return tmp_path


def test_every_plot_becomes_a_page_and_all_share_one_script(run, tmp_path, capsys):
    assert main(["plot", str(run), "--format", "html", "--output_dir", str(tmp_path)]) == 0
    paths = [tmp_path / f"{name}.html" for name in PLOTS]
    assert capsys.readouterr().out.split() == list(map(str, paths))
    assert set(tmp_path.iterdir()) == {tmp_path / SCRIPT, *paths}
    for path in paths:
        page = path.read_text()
        assert f'src="{SCRIPT}"' in page and "cdn" not in page


@pytest.mark.parametrize("format", MAGIC)
def test_a_plot_becomes_a_file_and_what_cannot_be_drawn_is_told(log, capsys, format):
    assert main(["plot", str(log), "--format", format]) == 0
    *notes, path = capsys.readouterr().out.splitlines()
    assert path == str(log / "plots" / f"training-curves.{format}")
    assert Path(path).read_bytes().startswith(MAGIC[format])
    assert [note.split(":")[0] for note in notes] == [f"No {name}" for name in list(PLOTS)[1:]]


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert main(["plot"]) == main(["plot", str(tmp_path / "nowhere")]) == main(["plot", str(tmp_path)]) == 2
    assert main(["plot", str(tmp_path), "--format", "gif"]) == 2
    told = capsys.readouterr().err.strip().split("\n")
    assert [line.split(":")[1].strip() for line in told] == ["run", "run", "plot", "--format"]
