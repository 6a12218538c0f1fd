"""`consistency-lens generate-chat` against servers that fail, a real one, and the job script that starts one."""

import json
import os
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from chat_server import MODEL, ChatServer, Reply, answer
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.cli import main as command_line
from consistency_lens.cli.generate_chat import main

ROOT = Path(__file__).parents[2]
JOB = ROOT / "examples" / "slurm" / "serve_vllm.sbatch"


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One [b]?"}\n{"prompt": "Two?"}\n')

    def flags(url, **changes):
        settings = {
            "prompts": tmp_path / "prompts.jsonl", "output_dir": tmp_path / "answers", "model": MODEL, "base_url": url,
            "retry_delay": 0.001, "max_tries": 2, "concurrency": 1,
        } | changes  # fmt: skip
        return [part for name, value in settings.items() for part in (f"--{name}", str(value))]

    return flags


def usage(prompt, completion):
    return {"prompt_tokens": prompt, "completion_tokens": completion}


def test_a_run_shows_its_first_answer_and_its_lengths(flags, tmp_path, capsys):
    with ChatServer(lambda text, _: answer(f"To {text}", usage=usage(30, 400), reasoning="Hm.")) as server:
        assert main(flags(server.url)) == 0
    printed = capsys.readouterr()
    assert "The first answer (id " in printed.out and "[user]\nOne [b]?" in printed.out
    assert "[assistant, thinking]\nHm.\n[assistant]\nTo One [b]?" in printed.out
    assert printed.out.count("[user]") == 1
    assert "2 of 2 prompts answered by tiny/chat: 2 with thinking, 0 cut at max_tokens" in printed.out
    assert "completion" in printed.out and "400" in printed.out and "800" in printed.out
    assert "2/2" in printed.err and "answer/s" in printed.err and "HTTP Request" not in printed.err
    assert len((tmp_path / "answers" / "messages.jsonl").read_text().splitlines()) == 2
    recorded = json.loads((tmp_path / "answers" / "generation.json").read_text())["arguments"]
    assert recorded["model"] == MODEL and recorded["max_tries"] == 2


def test_a_prompt_that_failed_shows_in_the_exit_code(flags, tmp_path, capsys):
    def reply(text, _):
        return Reply({}, status=500) if text == "Two?" else answer()

    with ChatServer(reply) as server:
        assert main(flags(server.url)) == 1
    assert "1 prompts failed (failures.jsonl)" in capsys.readouterr().out
    assert len((tmp_path / "answers" / "failures.jsonl").read_text().splitlines()) == 1


def test_settings_may_come_from_a_file(flags, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("extra_body: {chat_template_kwargs: {enable_thinking: true}}\ntemperature: 0.5\n")
    with ChatServer() as server:
        assert command_line.main(["generate-chat", "--config", str(recipe), *flags(server.url)]) == 0
    for body in server.requests:
        assert body["chat_template_kwargs"] == {"enable_thinking": True} and body["temperature"] == 0.5


class TestMistakes:
    def test_no_server_is_one_line_and_exit_code_2(self, flags, tmp_path, capsys):
        with ChatServer() as server:
            pass
        assert main(flags(server.url)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: base_url: no server answers at {server.url} (")
        assert not (tmp_path / "answers" / "generation.json").exists()

    def test_an_unknown_model_is_one_line_and_exit_code_2(self, flags, capsys):
        with ChatServer(lambda *_: Reply({"error": "no such model"}, status=404)) as server:
            assert main(flags(server.url, model="other")) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: model: the server at {server.url} lists {MODEL}, and gave no answer")

    def test_a_server_that_goes_away_is_one_line_and_exit_code_1(self, flags, capsys):
        def reply(text, _):
            if text == "Two?":
                server.__exit__()
            return answer()

        with ChatServer(reply) as server:
            assert main([*flags(server.url), "--disable_tqdm"]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("failed: no server answers at ") and "run the same command again" in error


class TestJob:
    """The job script with a stand-in for vLLM, on this machine."""

    @pytest.fixture
    def start(self, tmp_path):
        """Starts the job with a stand-in for `vllm` that runs the given Python lines."""

        def start(lines, **environment):
            program = tmp_path / "vllm"
            program.write_text(f"#!{sys.executable}\nimport sys\n{lines}\n")
            lens = tmp_path / "consistency-lens"
            lens.write_text(f'#!/bin/sh\nexec {sys.executable} -m consistency_lens "$@"\n')
            for file in (program, lens):
                file.chmod(file.stat().st_mode | stat.S_IXUSR)
            (tmp_path / "prompts.txt").write_text("One?\nTwo?\n")
            arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--output_dir", str(tmp_path / "answers")]
            settings = {
                "PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": MODEL, "PORT": str(free_port()),
                "SERVER_LOG": str(tmp_path / "server.log"), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}",
            }  # fmt: skip
            return subprocess.run(
                ["bash", str(JOB), *arguments],
                env=os.environ | settings | environment,
                capture_output=True,
                text=True,
                timeout=300,
            )

        return start

    def test_is_readable_to_bash(self):
        subprocess.run(["bash", "-n", str(JOB)], check=True)

    @pytest.mark.slow
    def test_serves_generates_and_stops(self, start, tmp_path):
        done = start(
            "import os, threading\n"
            "from chat_server import ChatServer, answer\n"
            "print(*sys.argv, os.getpid(), flush=True)\n"
            "port = int(sys.argv[sys.argv.index('--port') + 1])\n"
            "with ChatServer(lambda *_: answer(), port=port):\n"
            "    threading.Event().wait(200)\n",
            TENSOR_PARALLEL="2",
            VLLM_FLAGS="--max-model-len 64 --enforce-eager",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert len((tmp_path / "answers" / "messages.jsonl").read_text().splitlines()) == 2
        *flags, process = (tmp_path / "server.log").read_text().splitlines()[0].split()[1:]
        assert flags[:2] == ["serve", MODEL] and flags[-3:] == ["--max-model-len", "64", "--enforce-eager"]
        assert flags[flags.index("--tensor-parallel-size") + 1] == "2"
        assert flags[flags.index("--data-parallel-size") + 1] == "4"
        assert "stopping the server" in done.stdout
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)

    @pytest.mark.slow
    def test_says_so_if_the_server_ends_or_is_never_ready(self, start):
        done = start("print('no such model'); sys.exit(3)")
        assert done.returncode == 1 and "the server ended before it was ready:\nno such model" in done.stderr
        done = start("import time\ntime.sleep(100)", READY_SECONDS="1")
        assert done.returncode == 1 and "the server was not ready after 1 seconds" in done.stderr


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def transformers_serve(tmp_path):
    """A real `transformers serve` of a tiny model with a chat template: (address, name of the model)."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: pip install transformers[serving]")
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}w4"
    tokenizer.save_pretrained(folder)
    port = free_port()
    command = ["-m", "transformers.cli.transformers", "serve", str(folder), "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "serve.log", "wb") as log:
        process = subprocess.Popen([sys.executable, *command, "--host", "127.0.0.1"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while not is_healthy(port):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(60)


def is_healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_transformers_serve_answers(transformers_serve, flags, tmp_path, capsys):
    url, model = transformers_serve
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5 w6"}\n{"prompt": "w7 w8 w9"}\n{"prompt": "w5"}\n')
    assert main(flags(url, model=model, max_tokens=6, temperature=0.0)) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "answers" / "messages.jsonl").read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["w5 w6", "w7 w8 w9", "w5"]
    assert [row["prompt_tokens"] for row in rows] == [3, 4, 2]
    for row in rows:
        assert row["messages"][-1]["content"].strip() and 1 <= row["completion_tokens"] <= 6
        assert row["finish_reason"] == ("length" if row["completion_tokens"] == 6 else "stop")
    assert main(flags(url, model="another/model", output_dir=tmp_path / "other")) == 2
    assert "error: model: the server at " in capsys.readouterr().err
