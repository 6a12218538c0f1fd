"""Every block of code of the pages runs as it is written, where `make demo` and `make tuned-lens` were run before.

What cannot run here is in `NOT_RUN` with its reason. Placeholders are filled from `PLACEHOLDERS`; behind commands that
would take minutes go the flags of `SMALLER`. Nothing else is changed, and a block that nothing runs is a failure.
"""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from code_blocks import Block, blocks_of, commands_of, replaced, run_command, run_python
from hub_server import USER
from tiny_models import tiny_model
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "docker", "examples", "model_cards")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
# They say what something looks like, and nobody runs them.
NO_CODE = ("text", "bibtex")
# How a command begins that no test runs here, and why.
NOT_RUN = {
    ". .venv/bin/activate": "the tests run in the environment that they are in",
    "git clone <this repository>": "the tests run in a clone",
    "make demo": "it installs, and trains for minutes by what MADE_BEFORE has in small",
    "make test": "it is what runs this",
    "docker build": "there is no Docker where tests run; test_docker.py reads the Dockerfile",
    "mkdir -p outputs ~/.cache/huggingface": "it would write into the home folder",
    "lens=": "it names the call of Docker that begins the commands after it, which run here without",
    "pip install -r requirements.txt": "it installs gradio, which a Space has, from the package index",
    "LENS=outputs/tiny_stories python app.py": "it needs gradio and serves for ever; test_space.py runs its parts",
    "python tests/benchmarks/tuned_lens_vs_peer.py": "it installs the peer and measures for minutes; "
    "test_tuned_lens_vs_peer.py runs its parts",
}
MADE_BEFORE = (
    "consistency-lens train --config examples/recipes/tiny_stories.yaml",
    "consistency-lens tuned-lens fit --config examples/recipes/tuned_lens/tiny_stories.yaml",
)
PLACEHOLDERS = {
    "<Hub id or folder>": "a_model",
    "RECIPE.yaml": "examples/recipes/tiny_stories.yaml",
    "you/": f"{USER}/",
    "--repo me/": f"--repo {USER}/",
    "$lens consistency-lens ": "",
}
TRAINING = (
    "--max_steps 2 --stages 'warm_start 1s' policy_gradient --per_device_train_batch_size 4 --num_documents 20 "
    "--max_length 32 --positions_per_sequence 4 --num_text_tokens 5 --validation_fraction 0.3 --eval_rows 4 "
    "--interim_eval_rows 2 --eval_checks linear_probe best_of_n text_length --num_samples 1 --sample_steps 0 "
    "--logging_steps 1"
)
FIT = (
    "--dataset stories.txt --tokens 4096 --validation_tokens 128 --seq_len 32 --validation_fraction 0.1 "
    "--disable_tqdm true"
)
# Pages whose commands train, fit or draw for long.
LONG = ("docker/README.md", "docs/howto/own_model.md", "docs/howto/plots.md", "docs/speed.md", "docs/tuned_lens.md")
# What must be there after a page.
LEFT = {
    "README.md": (
        "outputs/mine/model.safetensors", "outputs/own/model.safetensors", "outputs/sweep/sweep.json",
        "lenses/tiny_stories/model.safetensors",
    ),
    "docs/publishing.md": ("lenses/tiny_stories/model.safetensors",),
    "docs/howto/from_python.md": ("outputs/from_python/model.safetensors",),
    "docs/speed.md": ("outputs/profile/profile.json",),
    "docs/tuned_lens.md": ("lenses/gpt2/model.safetensors", "outputs/story_model_7m/model.safetensors"),
}  # fmt: skip
# What is in a command -> the flags that go behind it, of which the last ones win.
SMALLER = {
    "examples/train_lens.py": TRAINING,
    "--profile true": "--stages gumbel --max_steps 6",  # two before, three that are profiled
    "consistency_lens train": TRAINING,
    "consistency-lens train": TRAINING,
    "consistency-lens submit": "--dry_run",  # each of its steps is a process of its own: test_submit_in_foreground.py
    "examples/evaluate_lens.py": "--rows 4 --fresh_encoder_steps 1",
    "tuned-lens fit": FIT,
    "examples/fit_tuned_lens.py": FIT,
    "tuned-lens gates": "--gates C",  # so little text does not make a lens
    "tuned-lens publish": "--tag v2026.01.31",
    "examples/tiny_stories/train.py": "--vocab_size 300 --hidden_size 32 --num_blocks 2 --context 64 --max_steps 2",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def of_page(path: Path) -> Any:
    """A page as a parameter of a test."""
    name = name_of(path)
    return pytest.param(path, id=name, marks=[pytest.mark.slow] if name in LONG else [])


def is_run(command: str) -> bool:
    return not command.startswith(tuple(NOT_RUN))


def filled(command: str) -> str:
    """The command as it runs here."""
    command = replaced(command, PLACEHOLDERS)
    return " ".join([command, *(flags for part, flags in SMALLER.items() if part in command)])


def run_block(page: Path, block: Block) -> None:
    if block.language == "python":
        run_python(replaced(block.code, PLACEHOLDERS), f"{name_of(page)}, line {block.line}")
        return
    assert block.language == "bash", f"{name_of(page)}, line {block.line}: nothing runs {block.language!r}"
    for command in filter(is_run, commands_of(block.code)):
        run_command(filled(command))


def write_stories(file: Path, count: int) -> None:
    words = itertools.product(("dog", "cat", "bird", "bear", "fish"), ("park", "house", "sea"), range(count // 15))
    stories = [f"Once upon a time, a little {a} went to the {b}. It saw {n} trees and was happy." for a, b, n in words]
    file.write_text("\n<|endoftext|>\n".join(stories))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder to begin in: what `make demo` and `make tuned-lens` leave, by their own commands, texts, and models."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "examples").symlink_to(ROOT / "examples")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_stories")
    for name, blocks in (("a_model", 14), ("gpt2", 4)):
        sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": blocks, "max_position_embeddings": 256}
        tiny_model("gpt2", **sizes).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, count in (("corpus.txt", 45), ("stories.txt", 300)):
        write_stories(folder / name, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in MADE_BEFORE:
            run_command(filled(command))
    return folder


@pytest.fixture
def clone(prepared, tmp_path, hub, monkeypatch) -> Path:
    """A folder like `prepared`, and a Hub with GPT-2."""
    folder = tmp_path / "clone"
    shutil.copytree(prepared, folder, symlinks=True, ignore=shutil.ignore_patterns("gpt2"))
    for name in ("gpt2", "openai-community/gpt2"):
        hub.add_repo("model", name, {file.name: file.read_bytes() for file in (prepared / "gpt2").iterdir()})
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("page", [of_page(page) for page in PAGES if blocks_of(page.read_text(encoding="utf-8"))])
def test_every_block_of_a_page_runs_as_written(page, clone):
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language not in NO_CODE:
            run_block(page, block)
    assert [name for name in LEFT.get(name_of(page), ()) if not Path(name).is_file()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_runs_and_is_committed_without_output(path, clone):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)
    run_python("\n\n".join("".join(cell["source"]) for cell in code), name_of(path))


def test_what_is_said_of_commands_is_of_commands_that_are_there():
    blocks = [block for page in PAGES for block in blocks_of(page.read_text(encoding="utf-8"))]
    commands = [command for block in blocks if block.language == "bash" for command in commands_of(block.code)]
    code = "\n".join([*commands, *(block.code for block in blocks if block.language == "python")])
    assert [start for start in NOT_RUN if not any(command.startswith(start) for command in commands)] == []
    assert [part for part in (*PLACEHOLDERS, *SMALLER) if part not in code] == []
    assert [name for name in (*LONG, *LEFT) if ROOT / name not in PAGES] == []


@pytest.mark.parametrize(
    "block", [Block("bash", "curl https://example.org", 1), Block("yaml", "layer: 2", 1)], ids=["command", "language"]
)
def test_code_that_nothing_runs_is_a_failure(block):
    with pytest.raises(AssertionError, match="nothing runs"):
        run_block(ROOT / "README.md", block)


@pytest.mark.parametrize(
    "page", ["- a list\n\n  ```bash\n  ls\n  ```\n", "```bash title=x\nls\n```\n", "~~~\nls\n~~~\n"]
)
def test_a_fence_of_another_look_is_a_failure(page):
    with pytest.raises(AssertionError, match="nothing reads a fence"):
        blocks_of(page)
