import json
import resource

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from consistency_lens.data.chat_answers import AnswerFiles, statistics_of
from consistency_lens.data.chat_client import Completion, PromptFailedError
from consistency_lens.data.chat_prompts import Prompt

PROMPTS = [Prompt(name, [{"role": "user", "content": f"{name}?"}]) for name in ("one", "two", "three")]


def completion(content="Yes.", thinking=None, truncated=False, tokens=(5, 7, None)):
    return Completion(content, thinking, truncated, "length" if truncated else "stop", *tokens)


def files(folder, prompts=PROMPTS, drop_truncated=False):
    return AnswerFiles(folder, prompts, drop_truncated)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_there_as_soon_as_they_are_added(tmp_path):
    with files(tmp_path) as answers:
        row = answers.add(PROMPTS[1], completion("Ja, é.", thinking="Hm."))
        assert lines(tmp_path / "messages.jsonl") == [row]
        assert [prompt.id for prompt in answers.waiting()] == ["one", "three"]
    assert row == {
        "id": "two",
        "messages": [*PROMPTS[1].messages, {"role": "assistant", "content": "Ja, é.", "thinking": "Hm."}],
        "finish_reason": "stop",
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "thinking_tokens": None,
    }
    assert [prompt.id for prompt in files(tmp_path).waiting()] == ["one", "three"]


def test_the_end_is_in_the_order_of_the_prompts(tmp_path):
    with files(tmp_path) as answers:
        for prompt in reversed(PROMPTS):
            answers.add(prompt, completion(f"{prompt.id}.", thinking="Hm." if prompt.id == "three" else None))
        answers.finish()
    rows = lines(tmp_path / "messages.jsonl")
    assert [row["id"] for row in rows] == ["one", "two", "three"]
    table = pq.read_table(tmp_path / "messages.parquet").to_pylist()
    for row in rows:
        for message in row["messages"]:
            message.setdefault("thinking", None)
    assert table == rows
    loaded = load_dataset("parquet", data_files=str(tmp_path / "messages.parquet"), split="train")
    assert loaded[2]["messages"][-1] == {"role": "assistant", "content": "three.", "thinking": "Hm."}


def test_a_half_line_at_the_end_is_dropped(tmp_path):
    with files(tmp_path) as answers:
        answers.add(PROMPTS[0], completion())
        answers.add(PROMPTS[1], completion())
    path = tmp_path / "messages.jsonl"
    whole, half = path.read_bytes().splitlines(keepends=True)
    for cut in (half[:-1], half[:20], b""):
        path.write_bytes(whole + cut)
        assert [prompt.id for prompt in files(tmp_path).waiting()] == ["two", "three"]
        assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b'{"id": "one", \n', b"[]\n", b'{"id": "one"}\n', b"\xff\n", b"\n"])
def test_a_line_that_is_no_answer_is_an_error(tmp_path, line):
    with files(tmp_path) as answers:
        answers.add(PROMPTS[0], completion())
    with open(tmp_path / "messages.jsonl", "ab") as file:
        file.write(line + b"{}")
    with pytest.raises(ValueError, match="output_dir: line 2 of .*messages.jsonl' is no answer"):
        files(tmp_path)


def test_answers_to_other_prompts_are_an_error(tmp_path):
    with files(tmp_path) as answers:
        answers.add(PROMPTS[1], completion())
    other = PROMPTS[1]._replace(messages=[{"role": "user", "content": "2?"}])
    for prompts in (PROMPTS[:1], [PROMPTS[0], other]):
        with pytest.raises(ValueError, match="a prompt that is not among the [12] now given .id 'two'.; choose"):
            files(tmp_path, prompts)


def test_of_two_answers_to_one_prompt_the_first_is_kept(tmp_path):
    with files(tmp_path) as answers:
        answers.add(PROMPTS[0], completion("first"))
        answers.add(PROMPTS[0], completion("second"))
    with files(tmp_path) as answers:
        answers.finish()
    assert [row["messages"][-1]["content"] for row in lines(tmp_path / "messages.jsonl")] == ["first"]


def test_truncated_answers_may_be_dropped_and_are_not_asked_for_again(tmp_path):
    with files(tmp_path, drop_truncated=True) as answers:
        answers.add(PROMPTS[0], completion(truncated=True))
        answers.add(PROMPTS[1], completion())
    with files(tmp_path, drop_truncated=True) as answers:
        assert [prompt.id for prompt in answers.waiting()] == ["three"]
        answers.finish()
    assert [row["id"] for row in lines(tmp_path / "messages.jsonl")] == ["two"]
    assert [row["id"] for row in lines(tmp_path / "truncated.jsonl")] == ["one"]
    assert pq.read_table(tmp_path / "messages.parquet")["id"].to_pylist() == ["two"]


def test_failures_are_those_of_the_last_run(tmp_path):
    with files(tmp_path) as answers:
        answers.fail(PROMPTS[0], PromptFailedError("status 500", 5))
        answers.fail(PROMPTS[1], PromptFailedError("status 500", 5))
        answers.finish()
    with files(tmp_path) as answers:
        answers.fail(PROMPTS[0], PromptFailedError("time-out", 2))
        answers.finish()
    failure = {"id": "one", "messages": PROMPTS[0].messages, "error": "time-out", "tries": 2}
    assert lines(tmp_path / "failures.jsonl") == [failure]
    with files(tmp_path) as answers:
        answers.finish()
    assert not (tmp_path / "failures.jsonl").exists()


def test_on_a_full_disk_an_answer_is_written_whole_or_not_at_all(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with files(tmp_path) as answers:
        answers.add(PROMPTS[0], completion())
        size = (tmp_path / "messages.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, limit[1]))
        try:
            with pytest.raises(OSError):
                answers.add(PROMPTS[1], completion())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert (tmp_path / "messages.jsonl").stat().st_size == size
        assert [prompt.id for prompt in answers.waiting()] == ["two", "three"]


def test_statistics_are_of_all_runs(tmp_path):
    with files(tmp_path, drop_truncated=True) as answers:
        answers.add(PROMPTS[0], completion(thinking="Hm.", tokens=(10, 1, 1)))
        answers.add(PROMPTS[1], completion(truncated=True, tokens=(20, 8, None)))
        answers.finish()
    with files(tmp_path, drop_truncated=True) as answers:
        answers.add(PROMPTS[2], completion(tokens=(60, None, None)))
        statistics = statistics_of(answers)
        assert (answers.added, answers.added_tokens) == (1, 0)
    tokens = statistics.pop("tokens")
    assert statistics == {
        "prompts": 3, "answers": 2, "truncated": 1, "dropped": 1, "with_thinking": 1, "failed": 0,
        "finish_reasons": {"stop": 2, "length": 1},
    }  # fmt: skip
    assert tokens["prompt"] == {
        "count": 3, "total": 90, "mean": 30.0, "min": 10, "p05": 11.0, "p50": 20.0, "p95": 56.0, "max": 60,
    }  # fmt: skip
    assert tokens["completion"]["count"] == 2 and tokens["thinking"]["total"] == 1
