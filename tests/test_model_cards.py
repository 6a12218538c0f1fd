"""The repository's cards, pictures and README are what `make cards` writes from the files that it keeps."""

import sys
from pathlib import Path

import matplotlib
import pytest
from hub_rules import check_model_card
from PIL import Image

ROOT = Path(__file__).parents[1]
CARDS = ("tiny_stories", "tuned_lens_tiny_stories")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Folder of a fresh rendering, which reads nothing from outputs/."""
    target = tmp_path_factory.mktemp("rendered")
    sys.path.insert(0, str(ROOT / "model_cards"))
    try:
        import render  # the script of `make cards`

        render.render(target)
    finally:
        sys.path.remove(str(ROOT / "model_cards"))
    return target


@pytest.mark.parametrize("name", ["README.md", "docs/speed.md", *(f"model_cards/{card}/README.md" for card in CARDS)])
def test_the_text_is_byte_for_byte_what_the_figures_lead_to(rendered, name):
    assert (rendered / name).read_bytes() == (ROOT / name).read_bytes(), "run `make cards`"


def test_the_pictures_are_those_of_the_figures(rendered):
    pictures = [path.relative_to(rendered) for path in rendered.rglob("*.png")]
    assert pictures
    for name in pictures:
        ours, theirs = (Image.open(root / name) for root in (rendered, ROOT))
        if ours.info.get("Software") == theirs.info.get("Software"):
            assert (rendered / name).read_bytes() == (ROOT / name).read_bytes(), "run `make cards`"
        else:  # drawn by another matplotlib
            assert ours.size == pytest.approx(theirs.size, rel=0.05), matplotlib.__version__


@pytest.mark.parametrize("name", CARDS)
def test_a_card_of_the_repository_has_a_head_that_the_hub_reads(name):
    head = check_model_card(ROOT / "model_cards" / name / "README.md")
    assert head["license"] == "mit" and "base_model" not in head  # the base is local: the embedded model
