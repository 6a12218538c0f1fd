"""The page on publishing, as it is written: its commands and its Python in their order, against a Hub of the tests."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from hub_server import USER
from transformers import AutoModelForCausalLM, AutoTokenizer

from consistency_lens import ConsistencyLensModel
from consistency_lens.cli.main import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8").replace("you/", f"{USER}/")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def run_folder(hub, tmp_path, monkeypatch):
    """A working folder as after `make demo`, its lens untrained."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples" / "tiny_stories", "examples/tiny_stories")
    subject = AutoModelForCausalLM.from_pretrained("examples/tiny_stories").eval()
    tokenizer = AutoTokenizer.from_pretrained("examples/tiny_stories")
    lens = ConsistencyLensModel.from_subject(subject, tokenizer, layer=2, training="frozen")
    lens.save_pretrained("outputs/tiny_stories")
    shutil.copy(ROOT / "model_cards" / "tiny_stories" / "metrics.json", "outputs/tiny_stories")


def test_the_commands_and_the_python_of_the_page_run(run_folder, capsys):
    publish, fetch = blocks("bash")
    for line in publish.splitlines():
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert "Nothing was uploaded" in (shown := capsys.readouterr().out) and "FVE" in shown
    for code in blocks("python"):
        exec(compile(code, "page", "exec"), {"__name__": "page"})
    for line in fetch.splitlines():
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert Path("lenses/tiny_stories/model.safetensors").read_bytes() == (
        Path("outputs/tiny_stories/model.safetensors").read_bytes()
    )
