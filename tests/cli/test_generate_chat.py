"""`consistency-lens generate-chat` against servers that answer and that fail, and what `tokenize` makes of it."""

import json
import os
import signal

import pytest
from chat_runs import flags
from chat_server import MODEL, ChatServer, Reply, answer
from tiny_lenses import tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens.cli import main as command_line
from consistency_lens.cli.generate_chat import main
from consistency_lens.data.tokenized_corpus import open_corpus

__all__ = ["flags"]


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
