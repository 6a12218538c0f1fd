"""A token that is planted is sent to the Hub, and stands nowhere else."""

import logging

import pytest
from hub_faults import Fault
from published_small_lenses import write_lens
from waits import waits

from consistency_lens.cli.main import main
from consistency_lens.hub.lens_pull import pull_lenses
from consistency_lens.hub.lens_push import push_lenses

__all__ = ["waits"]

PLANTED = "hf_PlantedTokenThatMustStandNowhere"
REPO = "user/lens"


@pytest.fixture
def planted(hub, monkeypatch):
    hub.token = PLANTED
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    return hub


def test_it_stands_in_no_log_message_file_or_output(planted, tmp_path, waits, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "httpx2", "httpcore"):
        caplog.set_level(logging.DEBUG, name)
    lens = write_lens(tmp_path / "small", base="somewhere", revision=None)
    told = [str(push_lenses(lens, REPO, tag="v2026.01.31", dry_run=True))]
    for fault in (Fault.ERROR, Fault.BUSY, Fault.REFUSED, Fault.CUT):
        for call in (lambda: push_lenses(lens, REPO), lambda: pull_lenses(REPO, tmp_path / "pulled", progress=False)):
            planted.planned.clear()
            planted.plan(fault, pattern="/(commit|resolve)/", times=99)
            try:
                told.append(str(call()))
            except (ValueError, OSError) as error:
                while error is not None:
                    told.append(f"{error} {error!r}")
                    error = error.__cause__ or error.__context__
    planted.planned.clear()
    assert main(["push", "--path", str(lens), "--repo", REPO]) in (0, 2)
    assert main(["pull", "--repo", REPO, "--path", str(tmp_path / "pulled"), "--disable_tqdm"]) == 0
    assert main(["list", "--repo", REPO, "--json"]) == 0
    assert f"Bearer {PLANTED}" in planted.authorizations
    captured = capsys.readouterr()
    texts = [*told, captured.out, captured.err, caplog.text, *(str(record.args) for record in caplog.records)]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    published = [
        blob.content for repo in planted.repos.values() for commit in repo.commits for blob in commit.files.values()
    ]
    assert len(told) > 8 and len(files) > 10 and caplog.records and published
    assert not [text for text in texts if PLANTED in text]
    assert not [file for file in files if PLANTED.encode() in file.read_bytes()]
    assert not [content for content in published if PLANTED.encode() in content]


def test_it_is_no_argument_of_a_command(planted, capsys):
    for command in ("push", "pull", "list"):
        assert main([command, "--repo", REPO, "--path", "x", "--token", PLANTED]) == 2
        assert PLANTED not in capsys.readouterr().err
