"""`consistency-lens explain` on a saved lens, and the mistakes that a user can make."""

import json
import shutil

import pytest
from tiny_lenses import disturb, tiny_lens, tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens import ConsistencyLensModel
from consistency_lens.cli.main import main
from consistency_lens.fingerprints import weights_hash

TEXT = "w9 w10 w11 w12"


@pytest.fixture(scope="module")
def lens():
    return disturb(tiny_lens())


@pytest.fixture(scope="module")
def folder(lens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    lens.subject.model.save_pretrained(folder / "subject")
    tiny_tokenizer().save_pretrained(folder / "subject")
    lens.save_pretrained(folder / "lens")
    return folder


def explain(folder, *line):
    return main(
        ["explain", *line, "--lens", str(folder / "lens"), "--model", str(folder / "subject"), "--device", "cpu"]
    )


def test_a_table_and_json_say_what_the_lens_says(folder, lens, capsys):
    expected = lens.explain(TEXT)
    assert explain(folder, TEXT) == 0
    shown = capsys.readouterr().out
    assert all(row.text.strip() in shown for row in expected)
    assert explain(folder, "--text", TEXT, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected.to_dict()))


def test_a_file_and_positions_from_the_end(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT + "\n")
    assert explain(folder, "--file", str(tmp_path / "text.txt"), "--positions", "-1", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["tokens"]
    assert (row["position"], row["token"]) == (4, "w12")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "text: got none; pass it"),
        ([TEXT, "--file", "x"], "text: got two, as an argument and in a file; pass one"),
        (["--file", "nowhere.txt"], "file: cannot read 'nowhere.txt'"),
        ([TEXT, "--positions", "9"], "explain: position 9 lies outside the text's 0..4"),
        ([TEXT, "--dtype", "int8"], "dtype must be one of"),
    ],
)
def test_a_mistake_is_told_in_one_line(folder, line, message, capsys):
    assert explain(folder, *line) == 2
    *bars, said = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {message}") and "Traceback" not in "".join(bars)


def test_another_subject_is_read_where_it_is_asked_for(folder, lens, tmp_path, capsys):
    # the lens that was trained knows the weights of its subject, the other one is a subject that was trained on
    with_hash = shutil.copytree(folder / "lens", tmp_path / "lens")
    provenance = {"cache": {"weights_hash": weights_hash(lens.subject.model)}}
    (with_hash / "provenance.json").write_text(json.dumps(provenance))
    shutil.copytree(folder / "subject", tmp_path / "subject")
    other = tiny_model("llama", seed=1)
    other.save_pretrained(tmp_path / "subject")
    assert explain(tmp_path, TEXT) == 2
    assert "verify_base=False to read another (--verify_base false," in capsys.readouterr().err
    assert explain(tmp_path, TEXT, "--verify_base", "false", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    expected = ConsistencyLensModel.from_pretrained(with_hash, base_model=other, verify_base=False).explain(TEXT)
    assert said == json.loads(json.dumps(expected.to_dict()))
