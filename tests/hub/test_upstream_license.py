import pytest

from consistency_lens.hub.upstream_license import license_in_card, upstream_license

NOTHING = (None, None, None)


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("license: mit", ("mit", None, None)),
        ("license: [mit, gpl]", ("other", None, None)),
        ("license: weird-1.0\nlicense_link: https://x.org", ("other", "weird-1.0", "https://x.org")),
        ("license: other\nlicense_name: tiny-terms", ("other", "tiny-terms", None)),
        ("tags: []", NOTHING),
        ("license: [mit", NOTHING),
        ("- a list", NOTHING),
    ],
)
def test_what_a_models_card_says_of_its_licence(tmp_path, head, found):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    (tmp_path / "LICENSE").write_text("A text.")
    license = license_in_card(str(tmp_path), None)
    assert (license.name, license.title, license.link) == found and license.texts == {}


def test_a_card_that_is_not_there_ends_nothing(tmp_path, hub, caplog):
    with caplog.at_level("INFO"):
        assert license_in_card(str(tmp_path), None).name is None
    assert caplog.records == []  # above all nothing of a Hub that could not be reached
    assert license_in_card("user/none", "a" * 40).name is None
    commit = hub.add_repo("model", "user/model", {"README.md": b"---\nlicense: mit\n---\n"}).head.oid
    assert license_in_card("user/model", commit).name == "mit"


def test_a_head_that_is_no_yaml_is_a_mistake_where_the_licence_is_needed(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match=r"license: the head of README.md beside the model cannot be read \(.*\)$"):
        upstream_license(str(tmp_path), None)
