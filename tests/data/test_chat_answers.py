import json
import resource

import pyarrow.parquet as pq
import pytest

from consistency_lens.data.chat_answers import AnswerFiles
from consistency_lens.data.chat_client import Completion, PromptFailedError
from consistency_lens.data.chat_prompts import Prompt
from consistency_lens.data.dataset_reading import read_dataset

PROMPTS = [Prompt(name, [{"role": "user", "content": f"{name}?"}]) for name in ("one", "two", "three")]


def completion(content="Yes.", thinking=None, truncated=False, tokens=(5, 7, None)):
    return Completion(content, thinking, truncated, "length" if truncated else "stop", *tokens)


def files(folder, prompts=PROMPTS):
    return AnswerFiles(folder, prompts)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_there_as_soon_as_they_are_added(tmp_path):
    with files(tmp_path) as answers:
        row = answers.add(PROMPTS[1], completion("Ja, é.", thinking="Hm."))
        assert lines(tmp_path / "answers.jsonl") == [row]
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


def test_messages_alone_are_written_in_the_order_of_the_prompts(tmp_path):
    with files(tmp_path) as answers:
        for prompt in reversed(PROMPTS):
            answers.add(prompt, completion(f"{prompt.id}.", thinking="Hm." if prompt.id == "three" else None))
        answers.write_messages()
    expected = [
        {"messages": [*prompt.messages, {"role": "assistant", "content": f"{prompt.id}."}]} for prompt in PROMPTS
    ]
    expected[2]["messages"][-1]["thinking"] = "Hm."
    assert lines(tmp_path / "messages.jsonl") == expected
    for row in expected:
        for message in row["messages"]:
            message.setdefault("thinking", None)
    assert pq.read_table(tmp_path / "train" / "messages.parquet").to_pylist() == expected


@pytest.mark.parametrize("source", [".", "train", "train/messages.parquet", "messages.jsonl"])
def test_the_folder_and_its_files_are_read_as_one_data_set(tmp_path, source):
    with files(tmp_path / "answers") as answers:
        (tmp_path / "answers").mkdir()
        answers.add(PROMPTS[0], completion("first", thinking="Hm."))
        answers.fail(PROMPTS[1], PromptFailedError("status 500", 5))
        answers.write_messages()
    (tmp_path / "answers" / "stats.json").write_text("{}")
    dataset = read_dataset(str(tmp_path / "answers" / source), cache_dir=tmp_path / "cache")
    assert dataset.column_names == ["messages"] and len(dataset) == 1
    assert dataset[0]["messages"][-1] == {"role": "assistant", "content": "first", "thinking": "Hm."}


def test_a_half_line_at_the_end_is_dropped(tmp_path):
    with files(tmp_path) as answers:
        answers.add(PROMPTS[0], completion())
        answers.add(PROMPTS[1], completion())
    path = tmp_path / "answers.jsonl"
    whole, half = path.read_bytes().splitlines(keepends=True)
    for cut in (half[:-1], half[:20], b""):
        path.write_bytes(whole + cut)
        assert [prompt.id for prompt in files(tmp_path).waiting()] == ["two", "three"]
        assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b'{"id": "one", \n', b"[]\n", b'{"id": "one"}\n', b"\xff\n", b"\n"])
def test_a_line_that_is_no_answer_is_an_error(tmp_path, line):
    with files(tmp_path) as answers:
        answers.add(PROMPTS[0], completion())
    with open(tmp_path / "answers.jsonl", "ab") as file:
        file.write(line + b"{}")
    with pytest.raises(ValueError, match="output_dir: line 2 of .*answers.jsonl' is no answer"):
        files(tmp_path)


def test_an_answer_to_another_prompt_of_that_id_is_an_error(tmp_path):
    with files(tmp_path) as answers:
        answers.add(PROMPTS[1], completion())
    other = PROMPTS[1]._replace(messages=[{"role": "user", "content": "2?"}])
    with pytest.raises(ValueError, match="output_dir: .* the answer to another prompt whose id is 'two' too; choose"):
        files(tmp_path, [PROMPTS[0], other])


def test_answers_to_prompts_that_are_not_given_play_no_part(tmp_path):
    with files(tmp_path) as answers:
        answers.add(PROMPTS[1], completion())
        answers.add(PROMPTS[0], completion())
    with files(tmp_path, PROMPTS[:1]) as answers:
        assert answers.waiting() == []
        answers.write_messages()
    assert [row["messages"][0]["content"] for row in lines(tmp_path / "messages.jsonl")] == ["one?"]
    assert [prompt.id for prompt in files(tmp_path).waiting()] == ["three"]


def test_truncated_answers_may_be_left_out(tmp_path):
    with files(tmp_path) as answers:
        answers.add(PROMPTS[0], completion(truncated=True))
        answers.add(PROMPTS[1], completion())
        assert [prompt.id for prompt in answers.waiting()] == ["three"]
        for dropped, kept in ((True, ["two?"]), (False, ["one?", "two?"])):
            answers.write_messages(drop_truncated=dropped)
            assert [row["messages"][0]["content"] for row in lines(tmp_path / "messages.jsonl")] == kept
            table = pq.read_table(tmp_path / "train" / "messages.parquet").to_pylist()
            assert [row["messages"][0]["content"] for row in table] == kept


def test_failures_are_those_of_the_last_run(tmp_path):
    with files(tmp_path) as answers:
        answers.fail(PROMPTS[0], PromptFailedError("status 500", 5))
        answers.fail(PROMPTS[1], PromptFailedError("status 400", 1, refused=True))
        assert (answers.failed, answers.skipped) == (1, 1)
        answers.write_messages()
    with files(tmp_path) as answers:
        answers.fail(PROMPTS[0], PromptFailedError("time-out", 2))
        answers.write_messages()
    failure = {"id": "one", "messages": PROMPTS[0].messages, "error": "time-out", "tries": 2}
    assert lines(tmp_path / "failures.jsonl") == [failure]
    with files(tmp_path) as answers:
        answers.write_messages()
    assert not (tmp_path / "failures.jsonl").exists()


def test_on_a_full_disk_an_answer_is_written_whole_or_not_at_all(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with files(tmp_path) as answers:
        answers.add(PROMPTS[0], completion())
        size = (tmp_path / "answers.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, limit[1]))
        try:
            with pytest.raises(OSError):
                answers.add(PROMPTS[1], completion())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert (tmp_path / "answers.jsonl").stat().st_size == size
        assert [prompt.id for prompt in answers.waiting()] == ["two", "three"]
