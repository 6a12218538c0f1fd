"""`consistency-lens tuned-lens publish | list | download | verify`: what is printed, and the exit codes."""

import json

import pytest
from hub_server import TOKEN
from published_lenses import add_subject, fit_lens, save_subject

from consistency_lens.cli.main import main

REPO, TAG = "user/tuned-lenses", "v2026.01.31"


@pytest.fixture
def lens(hub, tmp_path):
    """A lens of a model on the Hub."""
    commit = add_subject(hub, "org/tiny", save_subject(tmp_path / "there"))
    return fit_lens(tmp_path / "fitted", "org/tiny", commit).path


def run(capsys, *argv):
    """Exit code, and what is printed."""
    code = main(["tuned-lens", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_publish_list_download_verify(hub, lens, tmp_path, monkeypatch, capsys):
    code, said = run(capsys, "publish", "--lens", lens, "--repo", REPO, "--tag", TAG)
    assert code == 0 and f"/datasets/{REPO}/tree/{TAG} (commit {hub.dataset(REPO).head.oid})" in said
    assert "org/tiny: new" in said
    code, said = run(capsys, "list", "--repo", REPO)
    row = next(line for line in said.splitlines() if "org/tiny" in line)
    commit = hub.model("org/tiny").head.oid
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells == ["org/tiny", TAG, commit[:12], "passed", "not passed", "passed", "passed", "apache-2.0"]
    assert code == 0 and f"releases: {TAG}" in said
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, "download", "--repo", REPO, "--model", "org/tiny", "--revision", TAG, "--disable_tqdm")
    assert code == 0 and f"org/tiny {TAG} of commit {hub.dataset(REPO).tags[TAG]}; tuned_lenses/tiny" in said
    code, said = run(capsys, "verify", "--lens", "tuned_lenses/tiny", "--model", "org/tiny")
    assert code == 0 and "1 of 1 lenses passed" in said and "delta KL" in said
    assert TOKEN not in said


def test_main_that_has_gone_on_since_the_release_is_told(hub, lens, capsys):
    run(capsys, "publish", "--lens", lens, "--repo", REPO, "--tag", TAG)
    repo = hub.dataset(REPO)
    edited = repo.commit("main", "Update README.md", repo.head.files).oid
    code, said = run(capsys, "list", "--repo", REPO)
    assert code == 0 and f"commit {repo.tags[TAG]}; releases: {TAG}" in said
    assert f"Main has gone on since, to commit {edited}, which is no release" in said


def test_an_update_says_what_it_replaces(lens, capsys):
    run(capsys, "publish", "--lens", lens, "--repo", REPO, "--tag", TAG)
    code, said = run(capsys, "publish", "--lens", lens, "--repo", REPO, "--tag", "v2026.02.01")
    assert code == 0 and f"org/tiny: in place of that of {TAG}, which keeps its tag" in said
    code, said = run(capsys, "publish", "--lens", lens, "--repo", REPO, "--tag", TAG)
    assert code == 2 and f"error: tag: '{REPO}' has {TAG} already" in said


def test_a_dry_run_says_where_it_lies(hub, lens, capsys):
    code, said = run(capsys, "publish", "--lens", lens, "--repo", REPO, "--dry_run")
    assert code == 0 and "Nothing was uploaded" in said and str(lens.parent / ".lens.publish" / "upload") in said
    assert "  INDEX.json, " in said
    assert ("dataset", REPO) not in hub.repos


def test_exit_code_3_for_a_lens_that_is_not_as_it_was_fitted(lens, capsys):
    (lens / "params.pt").write_bytes(b"x")
    code, said = run(capsys, "publish", "--lens", lens, "--repo", REPO)
    assert code == 3 and "failed: tuned lens: " in said and "params.pt: pickled" in said
    code, said = run(capsys, "verify", "--lens", lens)
    assert code == 3 and "0 of 1 lenses passed" in said


def test_exit_code_3_for_another_model(hub, lens, tmp_path, capsys):
    save_subject(tmp_path / "other", seed=1)
    code, said = run(capsys, "verify", "--lens", lens, "--model", tmp_path / "other")
    assert code == 3 and "FAILED" in said and "not checked" in said
    # the same weights, but at another commit
    repo = hub.model("org/tiny")
    moved = repo.commit("main", "more", repo.head.files).oid
    code, said = run(capsys, "verify", "--lens", lens, "--model", "org/tiny", "--revision", moved)
    assert code == 3 and f"loaded {moved}, fitted on" in said


def test_exit_code_3_for_a_tampered_file(hub, lens, tmp_path, capsys):
    run(capsys, "publish", "--lens", lens, "--repo", REPO)
    repo, name = hub.dataset(REPO), "tuned_lenses/org/tiny/config.json"
    files = repo.head.files
    repo.commit("main", "tampered", {**files, name: files[name]._replace(content=files[name].content + b" ")})
    asked = ("download", "--repo", REPO, "--model", "org/tiny", "--output_dir", tmp_path / "x")
    code, said = run(capsys, *asked, "--revision", "main")
    assert code == 3 and "config.json of" in said and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["publish", "--repo", REPO], "lens: got none; pass it"),
        (["publish", "--lens", "x"], "repo: got none; pass it"),
        (["publish", "--lens", "nowhere", "--repo", REPO], "path: no tuned lens at"),
        (["download"], "repo: got none"),
        (["list"], "repo: got none"),
        (["verify"], "lens: got none"),
        (["verify", "--lens", "nowhere"], "path: no tuned lens at"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, argv, message):
    code, said = run(capsys, *argv)
    assert code == 2 and f"error: {message}" in said


def test_several_lenses_are_verified_by_themselves_alone(lens, tmp_path, capsys):
    lenses = lens.parent
    other = fit_lens(tmp_path / "fitted" / "more").path
    code, said = run(capsys, "verify", "--lens", lenses)
    assert code == 0 and "2 of 2 lenses passed; none was read with its model" in said
    code, said = run(capsys, "verify", "--lens", lenses, "--model", "org/tiny")
    assert code == 2 and "has 2 lenses, each of its own model; pass one of them" in said
    assert json.loads((other / "config.json").read_text())["model_type"] == "consistency_lens_tuned"
