"""One conversation and a server: every way to fail, and every form that thinking comes in."""

import asyncio
import logging
import time
from email.utils import formatdate

import pytest
from chat_server import MODEL, ChatServer, Reply, answer

from consistency_lens.data import chat_client
from consistency_lens.data.chat_client import (
    ChatClient,
    PromptFailedError,
    ServerGoneError,
    retry_after_seconds,
    retry_seconds,
    split_thinking,
)

KEY = "sk-secret-0123456789"
QUESTION = [{"role": "user", "content": "One?"}]


def complete(server, calls=1, check=False, **settings):
    """The client after so many calls, and the last answer."""
    arguments = {"retry_delay": 0.001, "timeout": 20.0, "parameters": {"max_tokens": 8}} | settings

    async def run():
        async with ChatClient(server.url, MODEL, **arguments) as client:
            if check:
                await client.check()
            for _ in range(calls):
                completion = await client.complete(QUESTION, seed=3)
            return client, completion

    return asyncio.run(run())


def check(url, model=MODEL, **settings):
    async def run():
        async with ChatClient(url, model, {}, **settings) as client:
            await client.check()

    asyncio.run(run())


class TestAnswers:
    def test_a_request_has_the_conversation_the_parameters_and_a_seed(self):
        with ChatServer() as server:
            _, completion = complete(server, parameters={"max_tokens": 8, "top_k": 5})
        assert server.requests == [{"model": MODEL, "messages": QUESTION, "seed": 3, "max_tokens": 8, "top_k": 5}]
        assert completion[:4] == ("An answer.", None, False, "stop")

    @pytest.mark.parametrize(
        ("usage", "counts"),
        [
            (None, (None, None, None)),
            ({"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}, (5, 7, None)),
            ({"prompt_tokens": 5, "completion_tokens": 7, "completion_tokens_details": None}, (5, 7, None)),
            ({"completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 4}}, (None, 7, 4)),
            ("many", (None, None, None)),
        ],
    )
    def test_tokens_are_counted_as_far_as_the_server_does(self, usage, counts):
        with ChatServer(lambda *_: answer(usage=usage)) as server:
            assert complete(server)[1][4:] == counts

    @pytest.mark.parametrize(
        ("message", "thinking", "content"),
        [
            ({"content": "Yes.", "reasoning_content": "Hm.\n"}, "Hm.", "Yes."),
            ({"content": "Yes.", "thinking": "Hm."}, "Hm.", "Yes."),
            ({"content": "Yes.", "reasoning": "Hm.", "reasoning_content": None}, "Hm.", "Yes."),
            ({"content": "Yes.", "reasoning_content": " ", "reasoning": "Hm."}, "Hm.", "Yes."),
            ({"content": "<think>no</think>Yes.", "reasoning": "Hm."}, "Hm.", "<think>no</think>Yes."),
            ({"content": "<think>\nHm.\n</think>\n\nYes."}, "Hm.", "Yes."),
            ({"content": "Yes.", "reasoning": ["Hm."]}, None, "Yes."),
            ({"content": "Yes."}, None, "Yes."),
        ],
    )
    def test_thinking_is_found_in_each_of_its_forms(self, message, thinking, content):
        with ChatServer(lambda *_: answer(**message)) as server:
            completion = complete(server)[1]
        assert (completion.thinking, completion.content) == (thinking, content)

    @pytest.mark.parametrize(
        ("content", "parts"),
        [
            ("  <think>Hm.</think> Yes.", ("Hm.", "Yes.")),
            ("<think>\n\n</think>\n\nYes.", (None, "Yes.")),
            ("Hm.\n</think>\nYes.", ("Hm.", "Yes.")),
            ("<think>Hm. And", ("Hm. And", "")),
            ("<think>a</think>b</think>c", ("a", "b</think>c")),
            ("Write <think>x</think>.", (None, "Write <think>x</think>.")),
            ("Yes.\n", (None, "Yes.\n")),
        ],
    )
    def test_a_block_of_thinking_stands_at_the_start(self, content, parts):
        assert split_thinking(content) == parts

    def test_the_first_output_is_logged_as_it_came(self, caplog):
        caplog.set_level(logging.INFO)
        with ChatServer(lambda text, tries: Reply({"odd": "é"}) if tries < 1 else answer()) as server:
            complete(server, calls=2)
        shown = [record.getMessage() for record in caplog.records if record.name.endswith("chat_client")]
        assert shown == ['first output of the server: {"odd": "é"}']

    @pytest.mark.parametrize(
        "message", [{"content": "An ans"}, {"content": None, "reasoning": "Hm"}, {"content": "<think>H"}]
    )
    def test_a_cut_answer_is_known_by_its_finish_reason(self, message):
        with ChatServer(lambda *_: answer(finish_reason="length", **message)) as server:
            completion = complete(server)[1]
        assert completion.truncated and completion.finish_reason == "length"


TRANSIENT = [
    ("status 500", Reply({"error": "oops"}, status=500)),
    ("status 503", Reply(b"<html>\nbusy</html>", status=503)),
    ("status 429", Reply({}, status=429, headers={"Retry-After": "0"})),
    ("connection", answer()._replace(cut=True)),
    ("malformed", Reply(b'{"choices": [{"mess')),
    ("malformed", Reply(b"\xff\xfe\x00")),
    ("malformed", Reply([1, 2])),
    ("malformed", Reply({"error": "nothing"})),
    ("malformed", Reply({"choices": []})),
    ("malformed", Reply({"choices": [{"finish_reason": "stop"}]})),
    ("malformed", answer(content=[{"type": "text", "text": "Yes."}])),
    ("malformed", answer(content="\ud83d")),
    ("unfinished", answer(finish_reason="abort")),
    ("unfinished", answer(finish_reason=None)),
    ("empty", answer(content=" \n")),
    ("empty", answer(content=None, reasoning="Hm.")),
]


class TestFailures:
    @pytest.mark.parametrize(("kind", "failure"), TRANSIENT)
    def test_a_passing_one_is_tried_again(self, kind, failure):
        with ChatServer(lambda text, tries: failure if tries < 2 else answer("Yes.")) as server:
            client, completion = complete(server)
        assert completion.content == "Yes." and client.retries == {kind: 2} and len(server.requests) == 3
        assert server.requests[0] == server.requests[2]

    @pytest.mark.parametrize(("kind", "failure"), TRANSIENT)
    def test_a_prompt_is_given_up_after_so_many_tries(self, kind, failure):
        with ChatServer(lambda *_: failure) as server, pytest.raises(PromptFailedError) as error:
            complete(server, max_tries=3)
        assert len(server.requests) == 3 == error.value.tries and not error.value.refused
        assert str(error.value) and "\n" not in str(error.value)

    def test_a_request_that_takes_too_long_is_tried_again(self):
        with ChatServer(lambda text, tries: Reply(None, hang=True) if tries < 1 else answer()) as server:
            client, _ = complete(server, timeout=1.0)  # enough for an answer on a machine that is busy
        assert client.retries == {"time-out": 1}

    def test_a_connection_that_the_server_drops_is_tried_again(self):
        def reply(text, tries):
            if tries == 0:
                server.closing.set()  # the handler says nothing
            else:
                server.closing.clear()
            return answer()

        with ChatServer(reply) as server:
            client, _ = complete(server)
        assert client.retries == {"connection": 1}

    @pytest.mark.parametrize("status", [400, 413])
    def test_a_refusal_of_one_prompt_is_not_tried_again(self, status):
        refusal = Reply({"error": {"message": "the prompt is long"}}, status=status)
        with ChatServer(lambda *_: refusal) as server:
            with pytest.raises(PromptFailedError, match="the prompt is long") as error:
                complete(server)
        assert len(server.requests) == 1 and error.value.refused

    def test_a_refused_key_ends_the_run_whenever_it_comes(self):
        with ChatServer(lambda text, tries: answer() if tries < 1 else Reply({}, status=401)) as server:
            with pytest.raises(ValueError, match="api_key_variable: the server refuses .*status 401"):
                complete(server, calls=2)

    @pytest.mark.parametrize("status", [403, 404, 405, 422])
    def test_a_refusal_of_every_prompt_ends_the_run_if_it_comes_first(self, status):
        def reply(text, tries):
            return answer() if tries < answered else Reply({}, status=status)

        answered = 0
        with ChatServer(reply) as server, pytest.raises(ValueError, match=f"refuses .*status {status}"):
            complete(server)
        answered = 1
        with ChatServer(reply) as server, pytest.raises(PromptFailedError, match=f"status {status}"):
            complete(server, calls=2)

    def test_a_server_that_is_gone_ends_the_run(self):
        with ChatServer() as server:
            pass
        with pytest.raises(ServerGoneError, match=f"no server answers at {server.url} any more"):
            complete(server, max_tries=2)

    def test_the_wait_grows_with_each_try_and_follows_the_server(self, monkeypatch):
        waits = []

        async def sleep(seconds):
            waits.append(seconds)

        monkeypatch.setattr(chat_client.asyncio, "sleep", sleep)
        replies = [Reply({}, status=500)] * 3 + [Reply({}, status=429, headers={"Retry-After": "7"}), answer()]
        with ChatServer(lambda text, tries: replies[tries]) as server:
            complete(server, retry_delay=0.2)
        for wait, longest in zip(waits, (0.2, 0.4, 0.8), strict=False):
            assert longest / 2 <= wait <= longest
        assert waits[3:] == [7.0]

    def test_waits_differ_and_have_a_limit(self):
        assert len({retry_seconds(3, 1.0) for _ in range(10)}) > 1
        assert retry_seconds(60, 1.0) <= chat_client.LONGEST_DELAY
        assert retry_seconds(1, 1.0, retry_after=1e9) == chat_client.LONGEST_RETRY_AFTER

    def test_retry_after_is_read_in_seconds_or_as_a_date(self):
        assert retry_after_seconds({"Retry-After": "12"}) == 12
        assert 20 < retry_after_seconds({"Retry-After": formatdate(time.time() + 30, usegmt=True)}) <= 30
        assert retry_after_seconds({"Retry-After": formatdate(time.time() - 30, usegmt=True)}) == 0
        assert retry_after_seconds({"Retry-After": "soon"}) == retry_after_seconds({}) == 0


class TestCheck:
    def test_a_server_that_lists_the_model_is_asked_for_nothing_more(self):
        with ChatServer() as server:
            check(server.url)
            check(f"{server.url}/")
        assert server.requests == []

    def test_no_server(self):
        with ChatServer() as server:
            pass
        with pytest.raises(
            ValueError, match=f"base_url: no server answers at {server.url} .*say: vllm serve {MODEL}$"
        ):
            check(server.url)

    def test_a_server_of_another_kind(self):
        neither = r"model: .* lists no models \(status 404\), and gave no answer for .* \(status 404.*up to /v1"
        with ChatServer() as server, pytest.raises(ValueError, match=neither):
            check(server.url.removesuffix("/v1"))

    def test_a_model_that_the_server_does_not_know(self):
        unknown = Reply({"message": "The model `other` does not exist."}, status=404)
        with ChatServer(lambda *_: unknown) as server:
            with pytest.raises(ValueError, match=f"model: .* lists {MODEL}, and gave no answer for 'other' .*not"):
                check(server.url, "other")

    @pytest.mark.parametrize("models", [Reply({"data": []}), Reply({}, status=500), Reply(b"<html>"), Reply([])])
    def test_a_model_that_the_server_knows_but_does_not_list(self, models):
        with ChatServer(models=models) as server:
            check(server.url, "a/folder")
        assert [request["max_tokens"] for request in server.requests] == [1]

    def test_a_key_that_the_server_does_not_take(self):
        with ChatServer(models=Reply({}, status=401)) as server:
            with pytest.raises(ValueError, match="api_key_variable: the server refuses a request without an API key"):
                check(server.url)
            with pytest.raises(ValueError, match="api_key_variable: the server refuses the API key"):
                check(server.url, api_key=KEY)

    def test_a_key_that_only_answers_need(self):
        with ChatServer(lambda *_: Reply({}, status=401), models=Reply({"data": []})) as server:
            with pytest.raises(ValueError, match="api_key_variable: the server refuses a request without an API key"):
                check(server.url)


class TestKey:
    def test_is_sent_as_a_bearer_token(self):
        with ChatServer() as server:
            complete(server, api_key=KEY, check=True)
            complete(server)
        assert server.authorizations == {f"Bearer {KEY}", None}

    @pytest.mark.parametrize("status", [400, 401, 500])
    def test_is_taken_out_of_what_the_server_says(self, status, caplog):
        caplog.set_level(logging.DEBUG)
        said = Reply(f"'x' * 150, wrong key: {KEY}".encode(), status=status)
        with ChatServer(lambda *_: said) as server, pytest.raises((PromptFailedError, ValueError)) as error:
            complete(server, api_key=KEY, max_tries=2)
        assert "<API key>" in str(error.value)
        assert KEY not in str(error.value) + caplog.text and "sk-secret" not in repr(error.value.__cause__)
