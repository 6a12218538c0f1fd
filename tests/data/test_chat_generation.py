"""Many prompts through a server that fails: what is kept, what is counted, and how a run goes on."""

import json
import logging
import multiprocessing
import threading

import pyarrow.parquet as pq
import pytest
from chat_server import MODEL, ChatServer, Reply, answer
from tiny_lenses import tiny_tokenizer

from consistency_lens.cli.main import main
from consistency_lens.data.chat_client import ServerGoneError
from consistency_lens.data.chat_generation import ChatGenerationArguments, generate_chat, only_writer, request_seed

KEY = "sk-secret-0123456789"


@pytest.fixture
def run(tmp_path):
    """Completes the prompts p0? p1? ... in `tmp_path / "answers"`; returns the statistics."""

    def run(server, count=12, on_first=None, **changes):
        (tmp_path / "prompts.txt").write_text("".join(f"p{i}?\n" for i in range(count)))
        settings = {
            "prompts": str(tmp_path / "prompts.txt"), "output_dir": str(tmp_path / "answers"), "model": MODEL,
            "base_url": server.url, "concurrency": 4, "retry_delay": 0.001, "disable_tqdm": True,
        }  # fmt: skip
        return generate_chat(ChatGenerationArguments(**settings | changes), on_first)

    return run


def rows(folder, name="messages.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def echo(text, tries):
    """An answer that depends on the prompt alone."""
    return answer(f"To {text}", usage={"prompt_tokens": 3, "completion_tokens": len(text)}, reasoning=f"Hm, {text}")


class TestBrokenServer:
    def test_prompt_after_prompt_that_fails_ends_the_run(self, run, tmp_path):
        def reply(text, tries):
            return echo(text, tries) if int(text[1:-1]) < 5 else Reply({"error": "broken"}, 502)

        said = "20 prompts in a row have failed .*502"
        with ChatServer(reply) as server, pytest.raises(ServerGoneError, match=said):
            run(server, count=200, max_tries=2)
        assert len(rows(tmp_path / "answers", "answers.jsonl")) == 5
        assert len(server.tries) < 40  # and not 200
        with ChatServer(echo) as server:
            assert run(server, count=200)["answers"] == 200

    def test_failures_with_answers_between_do_not(self, run):
        def reply(text, tries):
            return echo(text, tries) if int(text[1:-1]) % 3 == 0 else Reply({"error": "broken"}, 502)

        with ChatServer(reply) as server:
            statistics = run(server, count=90, max_tries=1, concurrency=1)
        assert (statistics["answers"], statistics["failed"]) == (30, 60)

    def test_nor_do_prompts_that_are_refused(self, run):
        def reply(text, tries):
            return echo(text, tries) if text == "p0?" else Reply({"error": "too long"}, 400)

        with ChatServer(reply) as server:
            statistics = run(server, count=60, concurrency=1)
        assert (statistics["answers"], statistics["skipped"]) == (1, 59)


class TestRun:
    def test_every_prompt_is_answered_once(self, run, tmp_path):
        with ChatServer(echo) as server:
            statistics = run(server)
        assert rows(tmp_path / "answers") == [
            {
                "messages": [
                    {"role": "user", "content": f"p{i}?"},
                    {"role": "assistant", "content": f"To p{i}?", "thinking": f"Hm, p{i}?"},
                ]
            }
            for i in range(12)
        ]
        assert set(server.tries.values()) == {1}
        assert json.loads((tmp_path / "answers" / "stats.json").read_text()) == statistics
        assert (statistics["prompts"], statistics["answers"], statistics["failed"]) == (12, 12, 0)
        assert statistics["tokens"]["server"]["completion"]["max"] == 4 and statistics["this_run"]["answers"] == 12
        assert pq.read_table(tmp_path / "answers" / "train").to_pylist()[7]["messages"][1]["content"] == "To p7?"

    def test_requests_under_way_are_as_many_as_allowed_and_no_more(self, run):
        together, fifth = threading.Barrier(4), threading.Event()

        def reply(text, tries):
            if server.in_flight > 4:
                fifth.set()
            together.wait(timeout=20)  # only when four are here does one go on
            fifth.wait(0.2)  # and leaves a fifth the time to come
            return echo(text, tries)

        with ChatServer(reply) as server:
            run(server, concurrency=4)
        assert server.most_in_flight == 4

    def test_a_server_that_fails_now_and_then_loses_nothing(self, run, tmp_path):
        failures = [
            Reply({}, status=500), Reply({}, status=429, headers={"Retry-After": "0"}), Reply(b'{"cho'),
            Reply({"choices": []}), echo("half", 0)._replace(cut=True), Reply(None, hang=True),
        ]  # fmt: skip

        def reply(text, tries):
            number = int(text.strip("p?"))
            return failures[(number + tries) % len(failures)] if tries < number % 4 else echo(text, tries)

        with ChatServer(echo) as server:
            run(server, output_dir=str(tmp_path / "whole"))
        with ChatServer(reply) as server:
            statistics = run(server, request_timeout=1.0, max_tries=4)
        assert statistics["failed"] == 0 and sum(statistics["this_run"]["retries"].values()) == 3 * (0 + 1 + 2 + 3)
        for name in ("messages.jsonl", "train/messages.parquet"):
            assert (tmp_path / "answers" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def test_a_prompt_that_keeps_failing_is_counted_and_tried_in_the_next_run(self, run, tmp_path, caplog):
        def reply(text, tries):
            return Reply({}, status=500) if text == "p3?" and tries < 5 else echo(text, tries)

        with ChatServer(reply) as server:
            statistics = run(server, max_tries=3)
            assert (statistics["answers"], statistics["failed"]) == (11, 1)
            (failure,) = rows(tmp_path / "answers", "failures.jsonl")
            assert failure["tries"] == 3 and failure["messages"] == [{"role": "user", "content": "p3?"}]
            assert failure["error"].startswith("status 500")
            assert "is left out after 3 tries: status 500" in caplog.text
            statistics = run(server, max_tries=3)
        assert (statistics["answers"], statistics["failed"], statistics["this_run"]["answers"]) == (12, 0, 1)
        assert not (tmp_path / "answers" / "failures.jsonl").exists()
        assert server.tries["p3?"] == 6 and server.tries["p4?"] == 1
        assert len(rows(tmp_path / "answers")) == 12

    def test_answers_cut_at_the_limit_are_counted_and_may_be_dropped(self, run, tmp_path):
        def reply(text, tries):
            return answer(text, finish_reason="length") if text in ("p1?", "p2?") else echo(text, tries)

        with ChatServer(reply) as server:
            kept = run(server)
            assert len(rows(tmp_path / "answers")) == 12
            dropped = run(server, drop_truncated=True)
            assert len(rows(tmp_path / "answers")) == 10
        assert (kept["answers"], kept["truncated"], kept["dropped"]) == (12, 2, 0)
        assert (dropped["answers"], dropped["truncated"], dropped["dropped"]) == (12, 2, 2)
        assert len(server.requests) == 12

    def test_the_first_answer_is_handed_over_once(self, run, tmp_path):
        seen = []
        with ChatServer(echo) as server:
            run(server, on_first=seen.append)
        assert len(seen) == 1 and seen[0] == rows(tmp_path / "answers", "answers.jsonl")[0]

    def test_seeds_belong_to_the_prompts(self, run, tmp_path):
        with ChatServer(echo) as server:
            run(server, count=6, output_dir=str(tmp_path / "few"))
            few = {body["messages"][0]["content"]: body["seed"] for body in server.requests}
        with ChatServer(echo) as server:
            run(server, count=12)
            many = {body["messages"][0]["content"]: body["seed"] for body in server.requests}
        assert len(set(many.values())) == 12 and few.items() <= many.items()
        assert all(0 <= seed < 2**31 for seed in many.values())
        assert request_seed(0, "a") != request_seed(1, "a")

    def test_sampling_parameters_are_sent_and_others_left_to_the_server(self, run, tmp_path):
        with ChatServer(echo) as server:
            sampling = {"temperature": 0.0, "max_tokens": 9, "reasoning_effort": "low"}
            run(server, count=1, **sampling, extra_body='{"top_k": 3}')
            run(server, count=1, output_dir=str(tmp_path / "plain"), seed=None)
        given, plain = server.requests
        assert given.keys() == {"model", "messages", "seed", *sampling, "top_k"}
        assert given | sampling | {"top_k": 3} == given
        assert plain.keys() == {"model", "messages", "max_tokens"}

    def test_what_the_server_refuses_is_skipped_with_its_reason(self, run, tmp_path):
        def reply(text, tries):
            long = Reply({"error": {"message": "maximum context length is 8 tokens"}}, status=400)
            return long if text == "p3?" else echo(text, tries)

        with ChatServer(reply) as server:
            statistics = run(server)
        assert (statistics["answers"], statistics["failed"], statistics["skipped"]) == (11, 0, 1)
        assert server.tries["p3?"] == 1 and len(rows(tmp_path / "answers")) == 11
        (skipped,) = rows(tmp_path / "answers", "failures.jsonl")
        assert skipped["messages"][0]["content"] == "p3?" and "maximum context length" in skipped["error"]

    def test_a_key_that_is_refused_in_the_middle_ends_the_run_and_keeps_the_answers(self, run, tmp_path, monkeypatch):
        monkeypatch.setenv("MY_KEY", KEY)

        def reply(text, tries):
            return Reply({"error": KEY}, status=401) if text == "p5?" else echo(text, tries)

        with ChatServer(reply) as server, pytest.raises(ValueError, match="refuses the API key") as error:
            run(server, concurrency=1, api_key_variable="MY_KEY")
        assert KEY not in str(error.value) and len(server.requests) == 6
        assert len(rows(tmp_path / "answers", "answers.jsonl")) == 5

    def test_a_tokenizer_counts_the_texts(self, run, tmp_path):
        tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
        with ChatServer(echo) as server:
            statistics = run(server, count=2, tokenizer=str(tmp_path / "tokenizer"))
            assert statistics["tokens"]["tokenizer"]["content"] == {
                "count": 2, "mean": 2.0, "median": 2.0, "p95": 2.0, "max": 2,
            }  # fmt: skip
            with pytest.raises(ValueError, match="tokenizer: cannot load that of .*nothing' .*; pass a Hub id"):
                run(server, tokenizer=str(tmp_path / "nothing"))


class TestResume:
    def test_a_finished_folder_needs_no_server(self, run, tmp_path):
        with ChatServer(echo) as server:
            run(server)
        before = (tmp_path / "answers" / "train" / "messages.parquet").read_bytes()
        statistics = run(server)
        assert statistics["answers"] == 12 and statistics["this_run"]["answers"] == 0
        assert (tmp_path / "answers" / "train" / "messages.parquet").read_bytes() == before

    def test_a_run_whose_server_went_away_goes_on(self, run, tmp_path):
        def reply(text, tries):
            if len(server.tries) > 5:
                threading.Thread(target=server.__exit__).start()
                server.closing.wait()
            return echo(text, tries)

        with ChatServer(reply) as server, pytest.raises(ServerGoneError):
            run(server, concurrency=1, max_tries=2)
        log = rows(tmp_path / "answers", "answers.jsonl")
        assert len(log) == 5 and not (tmp_path / "answers" / "messages.jsonl").exists()
        with ChatServer(echo) as server:
            statistics = run(server)
        assert statistics["answers"] == 12 and len(server.requests) == 7

    def test_more_prompts_may_be_asked_for(self, run, tmp_path):
        with ChatServer(echo) as server:
            assert run(server, max_examples=3)["answers"] == 3
            assert run(server)["answers"] == 12
            assert run(server, count=14)["answers"] == 14
        assert set(server.tries.values()) == {1}

    @pytest.mark.parametrize("change", [{"temperature": 0.5}, {"seed": 1}, {"model": "other"}, {"max_tokens": 9}])
    def test_other_settings_need_another_folder(self, run, change):
        (name,) = change
        with ChatServer(echo) as server:
            run(server)
            with pytest.raises(ValueError, match=f"output_dir: .* was made with {name} .*, now it is .*; choose"):
                run(server, **change)

    def test_two_at_a_time_are_refused(self, run, tmp_path):
        with ChatServer(echo) as server, only_writer(tmp_path / "answers"):
            with pytest.raises(ValueError, match="output_dir: another process is writing"):
                run(server)
        assert server.requests == []

    def test_a_killed_process_goes_on_and_ends_with_the_same_files(self, run, tmp_path):
        with ChatServer(echo) as server:
            run(server, output_dir=str(tmp_path / "whole"))
        seventh = threading.Event()

        def reply(text, tries):
            if len(server.tries) > 6:
                seventh.set()
                return Reply(None, hang=True)
            return echo(text, tries)

        flags = {
            "prompts": tmp_path / "prompts.txt", "output_dir": tmp_path / "answers", "model": MODEL, "concurrency": 2,
        }  # fmt: skip
        with ChatServer(reply) as server:
            flags["base_url"] = server.url
            arguments = ["generate-chat", *(part for name, of in flags.items() for part in (f"--{name}", str(of)))]
            # forked, as this process has imported everything already
            process = multiprocessing.get_context("fork").Process(target=main, args=(arguments,))
            process.start()
            try:
                while not seventh.wait(0.1):
                    assert process.is_alive()
            finally:
                process.kill()
                process.join()
        log = tmp_path / "answers" / "answers.jsonl"
        assert 5 <= len(log.read_bytes().splitlines()) <= 6 and not (tmp_path / "answers" / "stats.json").exists()
        with open(log, "ab") as file:  # what a crash in the middle of a write leaves
            file.write(log.read_bytes()[:40])
        with ChatServer(echo) as server:
            run(server)
        assert len(server.requests) in (6, 7)
        for name in ("messages.jsonl", "train/messages.parquet"):
            assert (tmp_path / "answers" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class TestKey:
    def test_is_in_no_log_and_no_file(self, run, tmp_path, monkeypatch, caplog, capfd):
        caplog.set_level(logging.DEBUG)
        monkeypatch.setenv("MY_KEY", f"{KEY}\n")

        def reply(text, tries):
            said = Reply({"error": f"no, Bearer {KEY}"}, status=500 if tries < 1 else 400)
            return said if text == "p0?" else echo(text, tries)

        with ChatServer(reply) as server:
            statistics = run(server, count=3, api_key_variable="MY_KEY", disable_tqdm=False)
        assert statistics["skipped"] == 1 and server.authorizations == {f"Bearer {KEY}"}
        assert "<API key>" in (tmp_path / "answers" / "failures.jsonl").read_text()
        files = [path for path in (tmp_path / "answers").rglob("*") if path.is_file()]
        texts = [path.read_bytes().decode(errors="replace") for path in files]
        assert not any("sk-secret" in text for text in [*texts, caplog.text, *capfd.readouterr()])

    def test_none_is_sent_where_none_is_set(self, run, monkeypatch):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with ChatServer(echo) as server:
            run(server, count=1)
        assert server.authorizations == {None}

    @pytest.mark.parametrize(("variable", "value"), [("MY_KEY", None), (KEY, None), ("MY_KEY", "two words")])
    def test_a_variable_without_a_key_is_an_error_that_shows_nothing(self, run, monkeypatch, variable, value):
        if value is not None:
            monkeypatch.setenv(variable, value)
        with ChatServer() as server, pytest.raises(ValueError, match="api_key_variable: names no env") as error:
            run(server, api_key_variable=variable)
        assert variable not in str(error.value) and str(value) not in str(error.value)


class TestArguments:
    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"prompts": ""}, "prompts: got none; pass one"),
            ({"output_dir": ""}, "output_dir: got none"),
            ({"model": ""}, "model: got none"),
            ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
            ({"max_tokens": -1}, "max_tokens must be at least 1"),
            ({"max_examples": 0}, "max_examples must be at least 1"),
            ({"request_timeout": 0.0}, "request_timeout must be above 0"),
            ({"temperature": -1.0}, "temperature must be 0"),
            ({"top_p": 1.5}, "top_p must lie above 0"),
            ({"base_url": "127.0.0.1:8000"}, "base_url: "),
            ({"base_url": "http://me:secret@host/v1"}, "base_url: has a user name or a query"),
            ({"base_url": "http://host/v1?key=secret"}, "base_url: has a user name or a query"),
            ({"base_url": "http://host:port/v1"}, "base_url: cannot be read"),
            ({"extra_body": "{"}, "extra_body: got '{', which is not JSON"),
            ({"extra_body": "[]"}, "extra_body: must be a JSON object"),
            ({"extra_body": {"stream": True}}, "extra_body: 'stream' cannot be set there"),
        ],
    )
    def test_mistakes_are_named(self, changes, error):
        with pytest.raises(ValueError, match=error) as raised:
            ChatGenerationArguments(**{"prompts": "p.txt", "output_dir": "o", "model": "m"} | changes)
        assert "secret" not in str(raised.value)
