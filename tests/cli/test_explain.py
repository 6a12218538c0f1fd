"""`consistency-lens explain` on a saved lens, and the mistakes that a user can make."""

import json

import pytest
from tiny_lenses import disturb, tiny_lens, tiny_tokenizer

from consistency_lens.cli.main import main

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
