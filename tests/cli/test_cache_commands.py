"""`verify`, `describe`, `push` and `pull` as they are typed, from a text file to a cache that came over a Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from published_caches import build_caches

from consistency_lens.cli import cache, describe, pull, push, verify
from consistency_lens.cli.describe import bar, histogram_text, readable_size

REPO = "user/tiny"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_caches(tmp_path_factory.mktemp("caches"))


def run(module, capsys, **settings):
    """Exit code, what was printed, and the last line of errors."""
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    capsys.readouterr()
    code = module.main([*arguments, "--disable_tqdm"])
    printed = capsys.readouterr()
    return code, printed.out, (printed.err.rstrip().splitlines() or [""])[-1]


def test_from_text_to_a_published_cache_and_back(hub, built, tmp_path, capsys):
    text = tmp_path / "stories.txt"
    text.write_text(
        "\n<|endoftext|>\n".join(" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(14)) for i in range(30))
    )
    settings = {"model": built.subject, "dataset": text, "output_dir": tmp_path / "root", "min_position": 4}
    settings |= {"rows_per_shard": 64, "layer": 1, "device": "cpu"}
    assert run(cache, capsys, **settings)[0] == 0
    layer = tmp_path / "root" / "stories" / "subject" / "layer_1"

    code, out, _ = run(verify, capsys, cache=tmp_path / "root", model=built.subject)
    assert code == 0 and "2 of 2 caches passed" in out and "FAILED" not in out
    figures = json.loads(run(describe, capsys, cache=layer / "train", json=True)[1])
    code, out, _ = run(describe, capsys, cache=layer / "train")
    assert code == 0 and f"{figures['rows']:,} of {figures['documents']:,} documents" in out

    code, out, _ = run(push, capsys, path=layer, repo=REPO, license="mit")
    assert code == 0 and f"{hub.url}/datasets/{REPO}" in out and hub.dataset(REPO).head.oid in out
    code, out, _ = run(pull, capsys, repo=REPO, path=tmp_path / "pulled")
    assert code == 0 and f"train: {figures['rows']} rows" in out and "here already" not in out
    code, out, _ = run(pull, capsys, repo=REPO, path=tmp_path / "pulled")
    assert code == 0 and out.count("here already") == 2
    assert run(verify, capsys, cache=tmp_path / "pulled", model=built.subject)[0] == 0

    shard = tmp_path / "pulled" / "train" / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 4
    shard.write_bytes(content)
    code, out, _ = run(verify, capsys, cache=tmp_path / "pulled")
    assert code == 3 and "1 of 2 caches passed" in out
    assert "shard-00001.arrow: sha256" in out and out.count("FAILED") == 1 and out.count("not checked") == 5


# verify


def test_the_wrong_subject_is_exit_code_3(built, tmp_path, capsys):
    import torch
    from tiny_lenses import tiny_tokenizer
    from tiny_models import tiny_model

    other = tiny_model("llama", seed=1)
    other.save_pretrained(tmp_path)
    tiny_tokenizer(bos=False).save_pretrained(tmp_path)
    code, out, _ = run(verify, capsys, cache=built.layer / "train", model=tmp_path, rows=9)
    assert code == 3 and out.count("FAILED") == 3
    assert "9 of 9 rows differ" in out
    assert run(verify, capsys, cache=built.layer, model=built.subject, dtype="bfloat16")[0] == 0
    assert torch.get_default_dtype() == torch.float32


def test_caches_made_in_several_precisions_are_verified_one_at_a_time(built, tmp_path, capsys):
    other = build_caches(tmp_path)
    file = other.layer / "train" / "provenance.json"
    provenance = json.loads(file.read_text())
    provenance["loaded_as"]["dtype"] = "bfloat16"
    file.write_text(json.dumps(provenance))
    code, _, error = run(verify, capsys, cache=other.layer, model=other.subject)
    assert code == 2 and "loaded in several ways (bfloat16, float32); verify one at a time" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": ""}, "path: got none; pass it"),
        ({"cache": "nowhere"}, "no folder at 'nowhere'"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"model": "no/such/folder"}, "cannot load 'no/such/folder'"),
        ({"model": "", "dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_mistakes_of_verify(built, capsys, settings, message):
    settings = {"cache": built.layer} | settings
    if settings.get("model") == "":
        settings["model"] = built.subject
    code, _, error = run(verify, capsys, **settings)
    assert code == 2 and error.startswith("error: ") and message in error


# describe


def test_a_cache_is_described(built, capsys):
    code, out, _ = run(describe, capsys, cache=built.layer / "train")
    assert code == 0
    for told in (
        "per dimension",
        "float16, rms about the mean",
        "seed 0",
        "Rows by norm",
        "beyond ten times the median norm",
        "'w",
    ):
        assert told in out


def test_several_caches_are_listed(built, tmp_path, capsys):
    code, out, _ = run(describe, capsys, cache=built.layer.parent)
    assert code == 0 and "layer_1/train" in out and "layer_1/validation" in out
    listed = json.loads(run(describe, capsys, cache=built.layer.parent, json=True)[1])
    assert [of["dataset_split"] for of in listed] == ["train", "validation"]
    assert all(f"{of['rows']:,}" in out for of in listed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": ""}, "cache: got none"),
        ({"cache": "nowhere"}, "no folder at 'nowhere'"),
        ({"top_tokens": 0}, "top_tokens must be at least 1, got 0"),
        ({"tokenizer": "nobody/nothing"}, "tokenizer: cannot load 'nobody/nothing'"),
    ],
)
def test_mistakes_of_describe(built, capsys, settings, message):
    code, _, error = run(describe, capsys, **{"cache": built.layer / "train"} | settings)
    assert code == 2 and error.startswith("error: ") and message in error


def test_no_bin_with_a_row_looks_empty_and_outliers_are_marked():
    histogram = {"log_spaced": True, "edges": [1.0, 10.0, 100.0, 1000.0], "rows": [1_000_000, 0, 1]}
    lines = histogram_text(histogram, 50.0).plain.strip().splitlines()
    assert lines[1].endswith("█" * 60)
    assert lines[2].rstrip().endswith(" 0")
    assert lines[3].endswith("1 ▏  beyond 10 x the median")
    assert bar(0, 10) == "" and bar(5, 10) == "█" * 30


def test_edges_stand_in_columns_and_the_bin_of_the_threshold_claims_no_more_than_it_holds():
    histogram = {"log_spaced": False, "edges": [5.0, 12.5, 20.25, 1234.0], "rows": [3, 2, 1]}
    lines = histogram_text(histogram, 15.0).plain.rstrip().splitlines()[-3:]
    assert [line[:13] for line in lines] == ["    5 –  12.5", " 12.5 – 20.25", "20.25 –  1234"]
    assert lines[0].endswith("█") and lines[1].endswith("10 x the median is 15")
    assert lines[2].endswith("beyond 10 x the median")


def test_without_a_tokenizer_the_flag_is_named(built, tmp_path, capsys):
    cache = shutil.copytree(built.layer / "train", tmp_path / "cache")
    file = cache / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"local": ["tokenizer"], "tokenizer": "subject"}))
    code, out, _ = run(describe, capsys, cache=cache)
    assert code == 0 and "(no tokenizer is to be had; pass one with --tokenizer)" in out
    code, out, _ = run(describe, capsys, cache=cache, tokenizer=built.subject)
    assert code == 0 and "no tokenizer" not in out and "'w" in out


def test_an_unfinished_cache_says_in_the_list_how_far_it_is(built, tmp_path, capsys):
    root = shutil.copytree(built.layer, tmp_path / "layer_1")
    (root / "train" / "provenance.json").unlink()
    (root / "train" / "building.json").write_text(json.dumps({"layer": 1, "num_shards": 3}))
    (root / "train" / "shard-00000.json").touch()
    code, out, _ = run(describe, capsys, cache=root)
    told = " ".join(out.replace("│", " ").split())
    assert code == 0 and "train (unfinished: 1 of 3 shards" in told and "in 1 shard," not in told
    code, out, _ = run(verify, capsys, cache=root)
    assert code == 3 and "1 of 2 caches passed" in out and "1 of 3 shards are done" in out
    assert "in 1 shard," in run(describe, capsys, cache=root / "validation")[1]


@pytest.mark.parametrize(
    ("size", "told"), [(999, "999 bytes"), (171_000, "171 kB"), (3.2e12, "3.2 TB"), (1e16, "1e+04 TB")]
)
def test_sizes_are_readable(size, told):
    assert readable_size(size) == told


# push and pull


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "llama"}, "holds a model (llama) that is no lens; pass the folder of a lens"),
        (None, "no activation cache at"),
    ],
)
def test_what_is_no_lens_and_no_cache_is_not_pushed(hub, tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "provenance.json").write_text("{}")
    code, _, error = run(push, capsys, path=tmp_path, repo=REPO)
    assert code == 2 and message in error
    assert hub.requests == []


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (push, {"path": "", "repo": REPO}, "path: got none"),
        (push, {"path": "nowhere", "repo": REPO}, "no folder at 'nowhere'"),
        (push, {"path": ".", "repo": ""}, "repo: got none"),
        (pull, {"path": "x", "repo": ""}, "repo: got none"),
        (pull, {"path": "", "repo": REPO}, "path: got none"),
        (pull, {"path": "x", "repo": "no/such"}, "no 'no/such' on the Hub"),
        (pull, {"path": "x", "repo": "not a name"}, "not a name"),
    ],
)
def test_mistakes_of_push_and_pull(hub, tmp_path, monkeypatch, capsys, module, settings, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(module, capsys, **settings)
    assert code == 2 and error.startswith("error: ") and message in error


def test_a_dry_run_says_where_it_lies(built, capsys):
    code, out, _ = run(push, capsys, path=built.layer, repo=REPO, dry_run="true", text="false")
    folder = Path(out.split(" lies in ")[1].strip())
    assert code == 0 and (folder / "README.md").is_file() and "`text`" not in (folder / "README.md").read_text()


def test_a_damaged_file_is_exit_code_3_and_a_hub_that_is_away_1(hub, built, tmp_path, capsys):
    assert run(push, capsys, path=built.layer, repo=REPO)[0] == 0
    repo = hub.dataset(REPO)
    name = "data/train-00000-of-00003.parquet"
    blob = repo.head.files[name]
    repo.commit("main", "damage", {**repo.head.files, name: blob._replace(content=blob.content[:-1] + b"?")})
    code, _, error = run(pull, capsys, repo=REPO, path=tmp_path / "pulled")
    assert code == 3 and error.startswith("failed: file: ") and name in error
    hub.__exit__()
    for module, settings in ((pull, {"path": tmp_path / "again"}), (push, {"path": built.layer})):
        code, _, error = run(module, capsys, repo=REPO, **settings)
        assert code == 1 and "cannot be reached" in error and hub.token not in error


@pytest.mark.slow
def test_the_commands_find_the_hub_by_the_environment(hub, built, tmp_path):
    """As `test_from_text_to_a_published_cache_and_back`, in processes of their own."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    for command in (
        ["push", "--path", built.layer, "--repo", REPO],
        ["pull", "--path", tmp_path / "pulled", "--repo", REPO],
        ["verify", "--cache", tmp_path / "pulled", "--model", built.subject],
    ):
        finished = subprocess.run(
            [sys.executable, "-m", "consistency_lens", *map(str, command)],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        assert hub.token not in finished.stdout + finished.stderr
