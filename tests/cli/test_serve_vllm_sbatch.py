"""The job script that starts vLLM and generates, with stand-ins for vLLM and for this package's command."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import MODEL, ChatServer
from started_programs import free_port, wait_for

ROOT = Path(__file__).parents[2]
JOB = ROOT / "examples" / "slurm" / "serve_vllm.sbatch"

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
