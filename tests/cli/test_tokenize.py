"""`consistency-lens tokenize`: what it prints, and its exit codes."""

import json

import pytest
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.cli import main as command_line
from consistency_lens.cli.tokenize import main
from consistency_lens.data import tokenization
from consistency_lens.data.tokenized_corpus import open_corpus

TEXT = "\n<|endoftext|>\n".join(" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(14)) for i in range(30))


@pytest.fixture
def flags(tmp_path):
    """Makes the flags of a call, with changes."""
    tiny_model("llama").config.save_pretrained(tmp_path / "subject")
    tiny_tokenizer().save_pretrained(tmp_path / "subject")
    (tmp_path / "text.txt").write_text(TEXT)
    given = {"dataset": tmp_path / "text.txt", "model": tmp_path / "subject", "output_dir": tmp_path / "corpus"}
    return lambda **changes: [
        part
        for name, value in {**given, "max_length": 10, "validation_fraction": 0.3, **changes}.items()
        for part in (f"--{name}", str(value))
    ]


def test_prints_statistics_and_does_nothing_the_second_time(flags, tmp_path, capsys):
    assert command_line.main(["tokenize", *flags()]) == 0
    printed = capsys.readouterr().out
    assert "The corpus lies in" in printed and "of them cut at max_length" in printed and "thinking" not in printed
    assert len(open_corpus(tmp_path / "corpus", "train")) + len(open_corpus(tmp_path / "corpus", "validation")) == 30
    assert main(flags()) == 0
    again = capsys.readouterr().out
    assert "already; nothing was done" in again
    assert again.splitlines()[:-1] == printed.splitlines()[:-1]


def test_a_data_set_on_the_hub_is_read_at_its_commit(hub, flags, tmp_path, capsys):
    texts = [" ".join(f"w{3 + (i * 7 + j * j) % 90}" for j in range(14)) for i in range(30)]
    lines = "".join(json.dumps({"story": text}) + "\n" for text in texts)
    repo = hub.add_repo("dataset", "org/stories", {"data/train.jsonl": lines.encode(), "README.md": b"---\n---\n"})
    given = flags(dataset="org/stories", text_column="story")
    assert main(given) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "corpus" / "tokenization.json").read_text())
    assert record["dataset_commit"] == repo.head.oid
    assert record["statistics"]["documents"] == 30
    assert main(flags(output_dir=tmp_path / "same")) == 0  # the same texts, from a file
    for split in ("train", "validation"):
        assert open_corpus(tmp_path / "corpus", split)[:] == open_corpus(tmp_path / "same", split)[:]
    first = repo.head.oid
    repo.commit("main", "less", {"data/train.jsonl": repo.head.files["data/train.jsonl"]._replace(content=b"{}")})
    again = flags(dataset="org/stories", text_column="story", dataset_revision=first, output_dir=tmp_path / "old")
    assert main(again) == 0
    assert open_corpus(tmp_path / "old", "train")[:] == open_corpus(tmp_path / "corpus", "train")[:]


@pytest.mark.parametrize("name", ["org/nothing", "org/private"])
def test_a_data_set_that_may_not_be_read_is_a_mistake_of_one_line(hub, flags, monkeypatch, capsys, name):
    hub.add_repo("dataset", "org/private", {"data/train.jsonl": b"{}"}, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(flags(dataset=name)) == 2
    error = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert error.startswith(f"error: dataset: cannot read '{name}'") and "hf_wrong" not in error


def test_explains_its_arguments(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0 and "--messages_column" in capsys.readouterr().out


def test_reads_a_file_of_arguments(flags, tmp_path):
    (tmp_path / "tokenize.yaml").write_text("max_length: 5\nlong_documents: split\npacking: true\n")
    assert main([*flags()[:-4], "--config", str(tmp_path / "tokenize.yaml"), "--max_length", "8"]) == 0
    settings = json.loads((tmp_path / "corpus" / "tokenization.json").read_text())["settings"]
    assert (settings["max_length"], settings["long_documents"], settings["packing"]) == (8, "split", True)


def test_prints_what_became_of_thinking(flags, tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "subject")
    chats = ([{"role": "user", "content": f"w{n}", "thinking": "w9"}] for n in range(10, 50))
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps({'messages': chat})}\n" for chat in chats))
    assert main(flags(dataset=tmp_path / "chats.jsonl", messages_column="messages")) == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    figures = {line[1].strip(): line[2].strip() for line in lines}
    assert figures["messages with thinking"] == figures["of them dropped by the chat template"] == "40"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model: got none"),
        ({"text_column": "tex"}, "did you mean 'text'"),
        ({"num_proc": 0}, "num_proc"),
        ({"num_proc": "x"}, "--num_proc: invalid int value: 'x'"),
        ({"max_lenght": 8}, "--max_lenght: unknown; did you mean --max_length?"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(flags, tmp_path, capsys, changes, message):
    assert main(flags(**changes)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "corpus").exists()


def test_a_place_that_cannot_be_written_to_is_a_failure_not_a_mistake(flags, tmp_path, capsys):
    assert main(flags(output_dir=tmp_path / "text.txt" / "corpus")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("failed: corpus: cannot write to ") and "text.txt/corpus'" in last


def test_tells_of_separators_that_divide_nothing(flags, tmp_path, capsys):
    assert main(flags()) == 0
    assert "endoftext" not in capsys.readouterr().out
    (tmp_path / "text.txt").write_text(f"{TEXT} <|endoftext|> w5\n")
    assert main(flags(output_dir=tmp_path / "other")) == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert {line[1].strip(): line[2].strip() for line in lines}["lines with <|endoftext|> and more"] == "1"


def test_a_full_disk_is_a_failure_and_leaves_nothing(flags, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenization, "write_json", full)
    assert main(flags()) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("failed: corpus: cannot write to ") and "No space left on device; make room" in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["subject", "text.txt"]
