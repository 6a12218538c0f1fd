import copy
import json

import pytest
from report_documents import made_up_explorer

from consistency_lens.report.explorer_file import read_explorer, weights_sha256, write_explorer

BROKEN = {
    "of another format": lambda e: e.update(format="other"),
    "of a later version": lambda e: e.update(version=99),
    "without a source": lambda e: e.update(source=None),
    "of a numbered lens": lambda e: e.update(lens=7),
    "without a word on ablation": lambda e: e.pop("ablation"),
    "without texts": lambda e: e.update(texts=[]),
    "words that are numbers": lambda e: e["words"].append(7),
    "a text without a title": lambda e: e["texts"][1].pop("title"),
    "a column that is short": lambda e: e["texts"][1]["fve"].pop(),
    "a column that is missing": lambda e: e["texts"][1].pop("norm"),
    "a place outside the words": lambda e: e["texts"][1]["tokens"].__setitem__(0, 10_000),
    "a negative place": lambda e: e["texts"][1]["after"][0].__setitem__(0, -1),
    "a number that is text": lambda e: e["texts"][1]["kl"].__setitem__(0, "<b>"),
    "a number that is none": lambda e: e["texts"][1]["kl"].__setitem__(0, float("nan")),
    "half a prediction": lambda e: e["texts"][1]["before"][0].pop(),
    "losses of other words": lambda e: e["texts"][1]["losses"][0].pop(),
    "an explanation that is markup": lambda e: e["texts"][1]["explanations"].__setitem__(0, "words"),
    "positions that are text": lambda e: e["texts"][1]["positions"].__setitem__(0, "1"),
}


@pytest.fixture(scope="module")
def explorer():
    return made_up_explorer(texts=2, tokens=5)


def test_comes_back_as_it_was(explorer, tmp_path):
    half = copy.deepcopy(explorer)
    half["words"][0] = "half a pair \ud83d, \u2028, </script>"
    half["texts"][0]["losses"][0] = []
    write_explorer(tmp_path / "explorer.json", half)
    assert read_explorer(tmp_path / "explorer.json") == half


@pytest.mark.parametrize("breaking", BROKEN.values(), ids=BROKEN)
def test_what_a_page_could_not_show_is_refused(explorer, breaking, tmp_path):
    broken = copy.deepcopy(explorer)
    breaking(broken)
    (tmp_path / "explorer.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"explorer: .*explorer.json' (is|has|holds|does)"):
        read_explorer(tmp_path / "explorer.json")


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_what_is_no_explorer_is_refused(content, tmp_path):
    (tmp_path / "explorer.json").write_text(content)
    with pytest.raises(ValueError, match="^explorer: "):
        read_explorer(tmp_path / "explorer.json")


def test_a_lens_is_known_by_its_weights(tmp_path):
    assert weights_sha256(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert weights_sha256(tmp_path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
