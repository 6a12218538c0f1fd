"""`consistency-lens generate-chat` against a real `transformers serve` of a tiny model that thinks."""

import json
import logging
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
import torch
from chat_runs import flags
from started_programs import free_port, wait_for
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.cli.generate_chat import main

__all__ = ["flags"]


# Which token follows which: the generation prompt ends with w4, <think> and </think> are 97 and 98.
CHAIN = {4: 97, 97: 5, 5: 9, 9: 98, 98: 6, 6: 2}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A real `transformers serve` of a tiny model that thinks: (address, name of the model)."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: pip install -e '.[serve]'")
    folder = tmp_path_factory.mktemp("served")
    save_thinking_model(folder / "model")
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder / "model")]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: process.poll() is not None or is_healthy(port), seconds=240)
        assert process.poll() is None, (folder / "log").read_text()
        yield f"http://127.0.0.1:{port}/v1", str(folder / "model")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
class TestTransformersServe:
    def test_completes_prompts_and_keeps_thinking(self, served, flags, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        url, model = served
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5 w6"}\n{"prompt": "w7 w8 w9"}\n{"prompt": "w5"}\n')
        assert main(flags(url, model=model, max_tokens=16, temperature=0.0, concurrency=2)) == 0
        rows = [json.loads(line) for line in (tmp_path / "answers" / "messages.jsonl").read_text().splitlines()]
        assert [row["messages"] for row in rows] == [
            [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": "w6", "thinking": "w5 w9"},
            ]
            for prompt in ("w5 w6", "w7 w8 w9", "w5")
        ]
        statistics = json.loads((tmp_path / "answers" / "stats.json").read_text())
        assert (statistics["with_thinking"], statistics["truncated"]) == (3, 0)
        assert statistics["tokens"]["server"]["prompt_and_system"]["max"] == 4
        assert statistics["tokens"]["server"]["completion"]["mean"] == len(CHAIN)
        assert caplog.text.count("first output of the server: {") == 1

    def test_knows_an_answer_that_was_cut_and_a_model_that_is_not_there(self, served, flags, tmp_path, capsys):
        url, model = served
        assert main(flags(url, model=model, max_tokens=2, temperature=0.0)) == 0
        statistics = json.loads((tmp_path / "answers" / "stats.json").read_text())
        assert (statistics["with_thinking"], statistics["truncated"]) == (2, 2)
        assert main(flags(url, model="another/model", output_dir=tmp_path / "other")) == 2
        assert "error: model: the server at " in capsys.readouterr().err


def save_thinking_model(folder):
    """A model whose next token depends on the last one alone: `<think> w5 w9 </think> w6`, whatever it is asked."""
    model = tiny_model("llama", vocab_size=99)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        head.zero_()
        for token, following in CHAIN.items():
            head[following] = 10 * embeddings[token] / embeddings[token].norm()
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}w4"
    tokenizer.save_pretrained(folder)


def is_healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
