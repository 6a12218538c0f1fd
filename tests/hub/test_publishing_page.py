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


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8").replace("you/", f"{USER}/")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run_commands(block, capsys):
    """Runs a block's commands; returns what they print."""
    for line in block.splitlines():
        assert main(shlex.split(line, comments=True)[1:]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


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


def check_pulled():
    pushed, pulled = (Path(folder, "model.safetensors") for folder in ("outputs/tiny_stories", "lenses/tiny_stories"))
    assert pulled.read_bytes() == pushed.read_bytes()


def test_the_commands_and_the_python_of_the_page_run(run_folder, capsys):
    publish, fetch = blocks("docs/publishing.md", "bash")
    shown = run_commands(publish, capsys)
    assert "Nothing was uploaded" in shown and "FVE" in shown
    for code in blocks("docs/publishing.md", "python"):
        exec(compile(code, "page", "exec"), {"__name__": "page"})
    run_commands(fetch, capsys)
    check_pulled()


def test_the_commands_of_the_readme_run(run_folder, capsys):
    (block,) = [block for block in blocks("README.md", "bash") if "consistency-lens push" in block]
    assert "FVE" in run_commands(block, capsys)
    check_pulled()
