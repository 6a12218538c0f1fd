"""The docs and notebooks: their Python runs as written, their commands and flags exist, their links lead somewhere."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from report_documents import made_up_explorer, made_up_text_length
from sweep_records import made_up, write_csv
from transformers import AutoModelForCausalLM, AutoTokenizer

from consistency_lens import ConsistencyLensModel
from consistency_lens.cli.completion import complete_parser
from consistency_lens.cli.main import main
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.data.corpus import corpus_from_rows, document_hash
from consistency_lens.report.explorer_file import EXPLORER_FILE, write_explorer

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
# its Python asks a Hub: see tests/hub/test_publishing_page.py
OF_THE_HUB = ROOT / "docs" / "publishing.md"
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
SCRIPTS = {
    "examples/train_lens.py": "train",
    "examples/cache_activations.py": "cache",
    "examples/evaluate_lens.py": "eval",
    "examples/fit_tuned_lens.py": "tuned-lens fit",
}
# flags of accelerate, torchrun and sbatch, those of all commands, and of scripts that are no commands of this package
OF_OTHERS = {
    "config_file", "num_processes", "num_machines", "nproc_per_node", "dependency", "help", "debug", "version",
    "model", "stories",
}  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """Command -> its flags, as its own help lists them."""
    commands = complete_parser()._subparsers._group_actions[0].choices
    tuned = commands.pop("tuned-lens")._subparsers._group_actions[0].choices
    parsers = commands | {f"tuned-lens {name}": parser for name, parser in tuned.items()}
    return {name: {flag.lstrip("-") for flag in of._option_string_actions} for name, of in parsers.items()}


@pytest.fixture(scope="module")
def lens(tmp_path_factory) -> Path:
    """A folder as `make demo` leaves it, its lens untrained."""
    folder = tmp_path_factory.mktemp("docs") / "lens"
    subject = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "tiny_stories").eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_stories")
    lens = ConsistencyLensModel.from_subject(subject, tokenizer, layer=2, training="frozen")
    lens.save_pretrained(folder)
    documents = [tokenizer(f"Once upon a time there was a {name}.")["input_ids"] for name in ("dog", "cat")]
    corpus = corpus_from_rows({"input_ids": ids, "document": document_hash(ids)} for ids in documents)
    build_activation_cache(
        lens.subject, corpus, folder / "data" / "activations-layer2", tokenizer=tokenizer, subject_name="tiny_stories",
        dataset_name="two sentences", dtype="float32", positions_per_sequence=2, min_position=2, progress=False,
    )  # fmt: skip
    kept = ROOT / "model_cards" / "tiny_stories"
    metrics = json.loads((kept / "metrics.json").read_text()) | {"text_length": made_up_text_length()}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    shutil.copy(kept / "log_history.json", folder)
    write_explorer(folder / EXPLORER_FILE, made_up_explorer())
    return folder


@pytest.fixture(scope="module")
def tuned_lens(tmp_path_factory) -> Path:
    """A folder as `make tuned-lens` leaves it, with made-up records of a sweep and without weights."""
    folder = tmp_path_factory.mktemp("docs") / "tuned_lens"
    shutil.copytree(ROOT / "model_cards" / "tuned_lens_tiny_stories", folder)
    (folder / "sweep").mkdir()
    for lens, ending in (("norm", ""), ("tuned", "-tuned")):
        write_csv(folder / "sweep" / f"sweep-records{ending}.csv", made_up(lens))
    return folder


def run_python(code: str, folders: dict[str, Path], monkeypatch, names: dict | None = None) -> None:
    monkeypatch.chdir(ROOT)
    for place, folder in folders.items():
        code = code.replace(place, str(folder))
    exec(compile(code, "block", "exec"), {"__name__": "block"} if names is None else names)


@pytest.mark.parametrize(
    "path", [path for path in PAGES if path != OF_THE_HUB and blocks(path, "python")], ids=name_of
)
def test_the_python_of_a_page_runs_as_written(path, lens, tuned_lens, monkeypatch):
    folders = {"outputs/tiny_stories": lens, "outputs/tuned_lenses/tiny_stories": tuned_lens}
    names = {"__name__": "block"}
    for block in blocks(path, "python"):  # one after the other, as a reader would
        run_python(block, folders, monkeypatch, names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_runs_and_is_committed_without_output(path, lens, monkeypatch):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)
    run_python("\n\n".join("".join(cell["source"]) for cell in code), {"outputs/tiny_stories": lens}, monkeypatch)


def commands_in(block: str) -> list[tuple[str, list[str]]]:
    """(command, flags) of each line of a shell block that starts this package."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"<[^>]*>", "X", line.partition("  #")[0]))
        script = next((word for word in words if word in SCRIPTS), None)
        if script is not None:
            found.append((SCRIPTS[script], words[words.index(script) + 1 :]))
        elif words[:1] == ["consistency-lens"]:
            count = 3 if words[1] == "tuned-lens" else 2
            found.append((" ".join(words[1:count]), words[count:]))
    return found


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_the_commands_of_a_page_and_their_flags_exist(path, flags):
    for block in blocks(path, "bash"):
        for command, words in commands_in(block):
            given = {word.lstrip("-").partition("=")[0] for word in words if word.startswith("--")}
            assert given <= flags[command] | {"help", "debug"}, command


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs" / "quickstart.md"], ids=name_of)
def test_the_command_that_explains_runs_as_written(path, lens, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lines = "".join(blocks(path, "bash")).replace("outputs/tiny_stories", str(lens)).splitlines()
    (line,) = [line for line in lines if line.startswith("consistency-lens explain")]
    assert main(shlex.split(line, comments=True)[1:]) == 0
    assert "FVE" in capsys.readouterr().out


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_the_flags_that_a_page_names_exist(path, flags):
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = {flag for code in re.findall(r"`([^`]+)`", prose) for flag in re.findall(r"(?<![\w-])--([a-z]\w+)", code)}
    assert named <= set.union(*flags.values()) | OF_OTHERS


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_the_links_of_a_page_lead_to_files(path):
    pictures = {"images/explanation.png", "images/tuned_lens.png"}  # the site has them from elsewhere
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert target in pictures or (path.parent / target).exists(), target


def test_every_page_is_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in PAGES if str(page.relative_to(ROOT / "docs")) not in site] == []
