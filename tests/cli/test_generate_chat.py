"""`consistency-lens generate-chat` against servers that fail, a real one, and the job script that starts one."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from chat_server import MODEL, ChatServer, Reply, answer
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.cli import main as command_line
from consistency_lens.cli.generate_chat import main
from consistency_lens.data.tokenized_corpus import open_corpus

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
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.out.splitlines() if "│" in line]
    assert ["prompt_and_system", "server", "2", "30", "30", "30", "30"] in table
    assert ["completion", "server", "2", "400", "400", "400", "400"] in table
    assert "2/2" in printed.err and "answer/s" in printed.err and "tokens/s" in printed.err
    assert "HTTP Request" not in printed.err
    assert len((tmp_path / "answers" / "messages.jsonl").read_text().splitlines()) == 2
    recorded = json.loads((tmp_path / "answers" / "generation.json").read_text())["arguments"]
    assert recorded["model"] == MODEL and recorded["max_tries"] == 2


@pytest.mark.parametrize(
    ("status", "code", "figures", "message"),
    [
        (500, 1, "1 failed, 0 refused", "; run the same command again to try them again"),
        (400, 0, "0 failed, 1 refused", "; those that the server refuses need another text or other settings"),
    ],
)
def test_a_prompt_that_failed_shows_in_the_exit_code_and_a_refused_one_does_not(
    flags, tmp_path, capsys, status, code, figures, message
):
    def reply(text, _):
        return Reply({}, status=status) if text == "Two?" else answer()

    with ChatServer(reply) as server:
        assert main(flags(server.url)) == code
    printed = capsys.readouterr().out
    assert f"failures.jsonl has the prompts without an answer, and why: {figures}{message}\n" in printed
    assert f"{figures} by the server" in printed
    assert len((tmp_path / "answers" / "failures.jsonl").read_text().splitlines()) == 1


def test_no_answer_at_all_shows_in_the_exit_code(flags, capsys):
    with ChatServer(lambda *_: Reply({"message": "no such parameter"}, status=400)) as server:
        assert main(flags(server.url)) == 1
    assert "0 of 2 prompts answered" in capsys.readouterr().out


@pytest.fixture
def interruptible():
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_says_how_to_go_on(flags, tmp_path, capsys):
    def reply(text, _):
        if text == "Two?":
            os.kill(os.getpid(), signal.SIGINT)
            return Reply(None, hang=True)
        return answer()

    with ChatServer(reply) as server:
        assert main([*flags(server.url), "--disable_tqdm"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("failed: interrupted; ") and "run the same command again to go on" in error
    assert len((tmp_path / "answers" / "answers.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("source", ["answers", "answers/messages.jsonl"])
def test_what_is_written_flows_into_tokenize_with_its_thinking(flags, tmp_path, source):
    prompts = "".join(f"w{n}\n" for n in range(10, 40))
    (tmp_path / "prompts.txt").write_text(prompts)

    def reply(text, _):
        return answer("w5", reasoning_content=f"w6 {text}") if text > "w2" else answer("w5")

    with ChatServer(reply) as server:
        assert main(flags(server.url, prompts=tmp_path / "prompts.txt", system_prompt="w3")) == 0
    chat = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    thinking = (
        "{% for m in messages %}{% if m.thinking %}<s> {{ m.thinking }} {% endif %}{{ m['content'] }} {% endfor %}"
    )
    for template, dropped in ((thinking, 0), (chat, 20)):
        texts, counts = tokenized(tmp_path / source, tmp_path / f"corpus{dropped}", template)
        assert (counts["thinking"], counts["thinking_dropped"]) == (20, dropped)
        for n in range(10, 40):
            kept = f"<s> w6 w{n} " if n >= 20 and not dropped else ""
            assert f"w3 w{n} {kept}w5 " in {f"{text} " for text in texts}


def tokenized(source, corpus, template):
    """The texts, without BOS and EOS, and the statistics of a corpus of chats under a chat template."""
    subject = corpus.with_name(f"{corpus.name}-subject")
    tiny_model("llama").config.save_pretrained(subject)
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.add_tokens("<s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(subject)
    arguments = {"dataset": source, "messages_column": "messages", "model": subject, "output_dir": corpus}
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    assert command_line.main(["tokenize", *flags, "--validation_fraction", "0.3"]) == 0
    rows = [row for split in ("train", "validation") for row in open_corpus(corpus, split)]
    texts = [tokenizer.decode(row["input_ids"]).removesuffix(" </s>") for row in rows]
    return texts, json.loads((corpus / "tokenization.json").read_text())["statistics"]


def test_settings_may_come_from_a_file(flags, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("extra_body: {chat_template_kwargs: {enable_thinking: true}}\ntemperature: 0.5\n")
    with ChatServer() as server:
        assert command_line.main(["generate-chat", "--config", str(recipe), *flags(server.url)]) == 0
    for body in server.requests:
        assert body["chat_template_kwargs"] == {"enable_thinking": True} and body["temperature"] == 0.5


def test_further_fields_may_come_from_a_flag(flags):
    with ChatServer() as server:
        assert main(flags(server.url, extra_body='{"top_k": 3}', reasoning_effort="low")) == 0
    assert all((body["top_k"], body["reasoning_effort"]) == (3, "low") for body in server.requests)


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
    """The job script with stand-ins for vLLM and for this package's command."""

    @pytest.fixture
    def start(self, tmp_path):
        """Starts the job: `vllm` runs Python lines, which know `port`, and `consistency-lens` shell lines."""

        def start(vllm=SERVE, lens='echo "$@" > generated', **environment):
            program(tmp_path / "vllm", f"#!{sys.executable}\n{STAND_IN}{vllm}")
            program(tmp_path / "consistency-lens", f"#!/bin/sh\n{lens}\n")
            # the server is asked ten times as often whether it is ready
            program(tmp_path / "sleep", '#!/bin/sh\n[ "$1" != 1 ] || set -- 0.1\nexec /bin/sleep "$1"\n')
            settings = {
                "PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": MODEL, "PORT": str(free_port()),
                "SERVER_LOG": str(tmp_path / "server.log"),
            }  # fmt: skip
            return subprocess.Popen(
                ["bash", str(JOB), "--prompts", "prompts.jsonl", "--output_dir", "two words"],
                cwd=tmp_path,
                env=os.environ | settings | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

        return start

    def test_is_readable_to_bash(self):
        subprocess.run(["bash", "-n", str(JOB)], check=True)

    def test_serves_generates_and_stops(self, start, tmp_path):
        job = start(TENSOR_PARALLEL="2", VLLM_FLAGS="--max-model-len 64 --enforce-eager")
        printed = job.communicate(timeout=60)[0]
        assert job.returncode == 0, printed
        served = (tmp_path / "served").read_text().split()
        assert served[:2] == ["serve", MODEL] and served[-3:] == ["--max-model-len", "64", "--enforce-eager"]
        assert served[served.index("--tensor-parallel-size") + 1] == "2"
        assert served[served.index("--data-parallel-size") + 1] == "4"
        generated = (tmp_path / "generated").read_text()
        assert generated.startswith(
            f"generate-chat --base_url http://127.0.0.1:{served[served.index('--port') + 1]}/v1"
        )
        assert generated.endswith("--prompts prompts.jsonl --output_dir two words\n")
        assert "the server is ready" in printed and "stopping the server" in printed
        assert_nothing_is_left(tmp_path)

    def test_a_generation_that_fails_stops_the_server_and_shows_in_the_exit_code(self, start, tmp_path):
        job = start(lens="exit 7")
        job.communicate(timeout=60)
        assert job.returncode == 7
        served = (tmp_path / "served").read_text().split()
        assert served[served.index("--tensor-parallel-size") + 1] == "8"
        assert served[served.index("--data-parallel-size") + 1] == "1"
        assert_nothing_is_left(tmp_path)

    def test_a_server_that_ends_early_ends_the_job(self, start, tmp_path):
        job = start("print('no such model'); sys.exit(3)")
        printed = job.communicate(timeout=60)[0]
        assert job.returncode == 1 and "the server ended before it was ready:\nno such model" in printed
        assert not (tmp_path / "generated").exists()
        assert_nothing_is_left(tmp_path)

    def test_a_port_with_another_server_ends_the_job(self, start, tmp_path):
        with ChatServer() as server:
            port = server.url.removesuffix("/v1").rpartition(":")[2]
            job = start(PORT=port)
            printed = job.communicate(timeout=60)[0]
        assert job.returncode == 1 and f"another server answers at port {port}" in printed
        assert not (tmp_path / "served").exists()

    def test_a_server_that_is_never_ready_ends_the_job(self, start, tmp_path):
        job = start("time.sleep(100)", READY_SECONDS="1")
        printed = job.communicate(timeout=60)[0]
        assert job.returncode == 1 and "the server was not ready after 1 seconds" in printed
        assert_nothing_is_left(tmp_path)

    def test_a_job_that_is_cancelled_leaves_nothing(self, start, tmp_path):
        job = start(lens="touch generating; exec sleep 100")
        wait_for((tmp_path / "generating").exists)
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=60)
        assert job.returncode == 143
        assert_nothing_is_left(tmp_path)


# What every stand-in for vLLM does first: it writes down its flags, and starts a worker that outlives it.
STAND_IN = """\
import os, subprocess, sys, time
worker = subprocess.Popen(["sleep", "100"])
with open("processes", "w") as file:
    print(os.getpid(), worker.pid, file=file)
with open("served", "w") as file:
    print(*sys.argv[1:], file=file)
port = int(sys.argv[sys.argv.index("--port") + 1])
"""
SERVE = """\
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def program(path, lines):
    path.write_text(lines)
    path.chmod(0o755)


def assert_nothing_is_left(folder):
    """Asserts that the stand-in and its worker, which has another parent by now, are gone."""
    for process in (folder / "processes").read_text().split():
        wait_for(lambda process=process: not is_running(process))


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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


# Which token follows which: the generation prompt ends with w4, <think> and </think> are 97 and 98.
CHAIN = {4: 97, 97: 5, 5: 9, 9: 98, 98: 6, 6: 2}


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
