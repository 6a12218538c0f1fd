"""`consistency-lens push | pull | list | verify` of lenses: what is printed, and the exit codes."""

import json
import shutil

import pytest
from published_small_lenses import write_lens

from consistency_lens.cli.main import main
from consistency_lens.hub.lens_push import push_lenses

LONE, REPO, TAG = "user/lens", "user/lenses", "v2026.01.31"


@pytest.fixture
def lens(hub, tmp_path):
    return write_lens(tmp_path / "small", base="somewhere", revision=None)


def run(capsys, *argv):
    """Exit code, and what is printed."""
    code = main([*map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_push_list_pull_verify(hub, lens, tmp_path, capsys):
    code, said = run(capsys, "push", "--path", lens, "--repo", LONE, "--tag", TAG)
    assert code == 0 and f"{hub.url}/{LONE}/tree/{TAG} (commit {hub.model(LONE).head.oid})" in said
    assert "lens: new, " in said and " files" in said
    code, said = run(capsys, "list", "--repo", LONE)
    row = next(line for line in said.splitlines() if "somewhere" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert code == 0 and cells[:8] == ["lens", "lens", "somewhere (local)", "3", "4", "0.500", "0.600", TAG]
    assert f"releases: {TAG}" in said
    code, said = run(capsys, "list", "--repo", LONE, "--json")
    listed = json.loads(said)
    assert code == 0 and listed["lenses"]["lens"]["metrics"]["fve"] == 0.5 and listed["releases"] == [TAG]
    pulled = tmp_path / "pulled"
    code, said = run(capsys, "pull", "--repo", LONE, "--path", pulled, "--revision", TAG, "--disable_tqdm")
    assert code == 0 and f"lens {TAG} of commit {hub.model(LONE).tags[TAG]}; {pulled}" in said
    assert "runs with trust_remote_code=True alone" in said
    code, said = run(capsys, "pull", "--repo", LONE, "--path", pulled, "--disable_tqdm")
    assert code == 0 and "here already" in said
    code, said = run(capsys, "verify", "--path", pulled)
    assert code == 0 and "1 of 1 lenses passed; not checked: model weights" in said
    (pulled / "metrics.json").write_text("{}")
    (pulled / "more.txt").write_text("x")
    code, said = run(capsys, "verify", "--path", pulled)
    assert code == 3 and "metrics.json: sha256" in said and "more.txt: not in" in said and "0 of 1 lenses" in said


def test_what_main_has_come_to_since_the_release_is_in_the_json_too(hub, lens, capsys):
    def listed(*argv):
        capsys.readouterr()
        return json.loads(run(capsys, "list", "--repo", LONE, "--json", *argv)[1])

    push_lenses(lens, LONE, tag=TAG)
    repo = hub.model(LONE)
    released = repo.head
    state = {"repo": LONE, "commit": released.oid, "releases": [TAG], "unfinished": None, "later": None}
    assert {key: listed()[key] for key in state} == state
    trained = repo.commit("main", "Training in progress, step 3", released.files)
    assert {key: listed()[key] for key in state} == state | {"later": trained.oid}
    repo.tags.clear()
    state |= {"commit": trained.oid, "releases": [], "unfinished": TAG}
    assert {key: listed("--revision", "main")[key] for key in state} == state


def test_the_help_of_list_says_what_is_in_its_json(capsys):
    with pytest.raises(SystemExit):
        main(["list", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "`unfinished`, a release that has no tag; `later`, the commit that main has gone on to since" in said


def test_a_collection(hub, tmp_path, capsys):
    for name in ("one", "two"):
        write_lens(tmp_path / "all" / name, base="somewhere", revision=None)
    code, said = run(capsys, "push", "--path", tmp_path / "all", "--repo", REPO, "--dry_run")
    assert code == 0 and "  one/config.json, " in said and "Nothing was uploaded" in said
    assert ("model", REPO) not in hub.repos
    assert run(capsys, "push", "--path", tmp_path / "all", "--repo", REPO, "--tag", TAG)[0] == 0
    code, said = run(capsys, "push", "--path", tmp_path / "all", "--repo", REPO, "--tag", TAG)
    assert code == 2 and f"error: tag: '{REPO}' has {TAG} already" in said
    mine = tmp_path / "mine"
    assert run(capsys, "pull", "--repo", REPO, "--lens", "two", "--path", mine, "--disable_tqdm")[0] == 0
    assert (mine / "config.json").is_file()
    code, said = run(capsys, "verify", "--path", tmp_path / "all")
    assert code == 0 and "2 of 2 lenses passed; not checked: checksums, model weights" in said


def test_main_that_has_gone_on_since_the_release_is_told(hub, lens, tmp_path, capsys):
    push_lenses(lens, LONE, tag=TAG)
    assert "Main" not in run(capsys, "list", "--repo", LONE)[1]
    repo = hub.model(LONE)
    trained = repo.commit("main", "Training in progress, step 3", repo.head.files).oid
    code, said = run(capsys, "list", "--repo", LONE)
    assert code == 0 and f"commit {repo.tags[TAG]}; releases: {TAG}" in said
    assert f"Main has gone on since, to commit {trained}, which is no release" in said
    assert run(capsys, "pull", "--repo", LONE, "--path", tmp_path / "pulled", "--disable_tqdm")[0] == 0


def test_exit_code_3_for_a_lens_that_is_not_what_was_published(hub, lens, tmp_path, capsys):
    push_lenses(lens, LONE, tag=TAG)
    repo = hub.model(LONE)
    files = repo.head.files
    changed = files["README.md"]._replace(content=files["README.md"].content[::-1])
    repo.commit("main", "tampered", {**files, "README.md": changed})
    asked = ("pull", "--repo", LONE, "--path", tmp_path / "x", "--disable_tqdm")
    code, said = run(capsys, *asked, "--revision", "main")
    assert code == 3 and "failed: file: README.md of" in said and not (tmp_path / "x").exists()
    (lens / "state.pt").write_bytes(b"x")
    code, said = run(capsys, "push", "--path", lens, "--repo", LONE)
    assert code == 3 and "state.pt: pickled" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["push", "--repo", LONE], "path: got none; pass it"),
        (["push", "--path", "nowhere", "--repo", LONE], "path: no folder at 'nowhere'"),
        (["pull", "--path", "x"], "repo: got none; pass it"),
        (["pull", "--path", "x", "--repo", "user/nothing"], "repo: no 'user/nothing' on the Hub, or it is private"),
        (["list"], "repo: got none"),
        (["verify"], "path: got none; pass it"),
        (["verify", "--path", "a", "--cache", "b"], "path: got 'a' and the cache 'b'; pass one of them"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(hub, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, *argv)
    assert code == 2 and f"error: {message}" in said


def test_flags_of_another_kind_are_a_mistake(hub, lens, capsys):
    code, said = run(capsys, "push", "--path", lens, "--repo", LONE, "--language", "en")
    assert code == 2 and "language: got ['en'], but" in said and "holds a lens; leave it out" in said
    push_lenses(lens, LONE, tag=TAG)
    code, said = run(capsys, "pull", "--path", "x", "--repo", LONE, "--split", "train")
    assert code == 2 and "holds no activation cache" in said


def test_a_folder_of_something_else_and_of_several_kinds_is_refused(hub, lens, tmp_path, capsys):
    shutil.copytree(lens, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    code, said = run(capsys, "push", "--path", tmp_path / "other", "--repo", LONE)
    assert code == 2 and "holds a model (llama) that is no lens" in said
    (tmp_path / "empty").mkdir()
    code, said = run(capsys, "verify", "--path", tmp_path / "empty")
    assert code == 2 and "no lens and no activation cache at" in said


def test_a_model_and_a_data_set_of_one_name_are_told_apart(hub, lens, capsys):
    push_lenses(lens, LONE, tag=TAG)
    hub.add_repo("dataset", LONE, {"data/train.csv": b"x"})
    code, said = run(capsys, "list", "--repo", LONE)
    assert code == 2 and f"is a model and a data set; write datasets/{LONE} for the data set" in said
    code, said = run(capsys, "list", "--repo", f"datasets/{LONE}")
    assert code == 2 and "holds no lenses" in said
