"""The pages: the flags that they name exist, their links lead somewhere. Their code: `test_code_blocks.py`."""

import re
from pathlib import Path

import pytest
from code_blocks import blocks_of

from consistency_lens.cli.completion import complete_parser
from consistency_lens.schedules import Schedule

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
# flags of accelerate, torchrun and sbatch, those of all commands, and of scripts that are no commands of this package
OF_OTHERS = {
    "config_file", "num_processes", "num_machines", "nproc_per_node", "dependency", "help", "debug", "version",
    "model", "stories", "shapes", "objectives", "modes",
}  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Those of every command, as its own help lists them."""
    commands = complete_parser()._subparsers._group_actions[0].choices
    tuned = commands.pop("tuned-lens")._subparsers._group_actions[0].choices
    parsers = [*commands.values(), *tuned.values()]
    return {flag.lstrip("-") for parser in parsers for flag in parser._option_string_actions}


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_the_flags_that_a_page_names_exist(path, flags):
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    named = {flag for code in re.findall(r"`([^`]+)`", prose) for flag in re.findall(r"(?<![\w-])--([a-z]\w+)", code)}
    assert named <= flags | OF_OTHERS


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_the_links_of_a_page_lead_to_files(path):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_every_page_is_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in PAGES if str(page.relative_to(ROOT / "docs")) not in site] == []


def test_the_schedules_of_the_page_on_training_are_schedules():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = [block for block in blocks_of(page) if block.language == "text"]
    kinds = [Schedule.parse(line).kind for line in block.code.splitlines()]
    assert set(kinds) == {"constant", "linear", "cosine", "exponential", "polynomial", "restarts"}
