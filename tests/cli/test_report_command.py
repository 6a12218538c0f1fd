"""`consistency-lens report` on a lens that was just trained, with the documents that its training held out."""

import json
import socket

import pytest
from test_eval import TEXT, as_flags
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.cli import main as command_line
from consistency_lens.cli import train
from consistency_lens.cli.report import main
from consistency_lens.data.corpus import document_hash, is_validation_document


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tiny_model("llama").save_pretrained(folder / "subject")
    tiny_tokenizer().save_pretrained(folder / "subject")
    (folder / "text.txt").write_text(TEXT)
    settings = {
        "model": folder / "subject", "layer": 1, "num_text_tokens": 3, "min_position": 4, "max_length": 16,
        "dataset": folder / "text.txt", "positions_per_sequence": 3, "validation_fraction": 0.3, "eval_rows": 16,
        "num_samples": 2, "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "logging_steps": 1,
        "output_dir": folder / "lens", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "sample_steps": 0,
    }  # fmt: skip
    assert train.main(as_flags(settings)) == 0
    return folder / "lens"


def test_a_run_becomes_a_page(trained, capsys):
    assert command_line.main(["report", str(trained), "--device", "cpu", "--max_tokens", "60"]) == 0
    assert capsys.readouterr().out == f"Report: {trained / 'report.html'}\n"
    explorer = json.loads((trained / "explorer.json").read_text())
    assert sum(len(text["tokens"]) for text in explorer["texts"]) == 60
    held_out = [text for text in TEXT.split("\n<|endoftext|>\n") if is_validation_document(document_hash(text), 0.3)]
    for text in explorer["texts"]:
        pieces = [explorer["words"][place].strip() for place in text["tokens"]]
        assert any(whole.startswith(" ".join(pieces)) for whole in held_out)


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main([]) == 2 and main([str(tmp_path / "nowhere")]) == 2
    assert main([str(tmp_path), "--max_token", "3"]) == 2
    told = capsys.readouterr().err.strip().split("\n")
    assert len(told) == 3 and told[0].startswith("error: run: got none") and "did you mean --max_tokens?" in told[2]


def test_a_port_that_is_taken_is_told_before_a_lens_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command_line.main(["serve", "no_lens", "--port", str(port)]) == 2
    assert (
        f"cannot listen at 127.0.0.1:{port} (Address already in use); pass another --port" in capsys.readouterr().err
    )
