import json

import pytest
from datasets import Dataset

from consistency_lens.data.chat_prompts import read_prompts

TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi.", "thinking": "Polite."}]


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines, or a text as it is; returns the path."""

    def write(content, name="prompts.jsonl"):
        path = tmp_path / name
        rows = content if isinstance(content, str) else "".join(f"{json.dumps(row)}\n" for row in content)
        path.write_text(rows, encoding="utf-8")
        return str(path)

    return write


def messages(*args, **kwargs):
    return [prompt.messages for prompt in read_prompts(*args, **kwargs)]


def test_a_text_file_has_a_prompt_a_line(write):
    source = write("One?\n\n  Two? \nThree? é", "prompts.txt")
    assert messages(source) == [[user("One?")], [user("Two?")], [user("Three? é")]]


def test_json_lines_hold_texts_or_messages(write):
    rows = [{"prompt": "One?"}, {"messages": [*TURNS, user("Two?")]}, {"prompt": [user("Three?")], "messages": TURNS}]
    assert messages(write(rows)) == [[user("One?")], [*TURNS, user("Two?")], [user("Three?")]]


@pytest.mark.parametrize("column", [None, "question"])
def test_parquet_and_folders_of_it_are_read_as_datasets(tmp_path, column):
    (tmp_path / "set").mkdir()
    rows = [{"messages": [*TURNS, user("One?")], "question": "Two?", "id": 7}]
    Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    expected = [[user("Two?")]] if column else [[*TURNS, user("One?")]]
    assert messages(str(tmp_path / "set" / "train.parquet"), column) == expected
    assert messages(str(tmp_path / "set"), column) == expected
    assert read_prompts(str(tmp_path / "set"), column)[0].id == "7"


def test_a_system_prompt_joins_the_conversations_that_have_none(write):
    own = {"role": "developer", "content": "Be long."}
    source = write([{"prompt": "One?"}, {"prompt": [own, user("Two?")]}])
    system = {"role": "system", "content": "Be brief."}
    assert messages(source, system_prompt="Be brief.") == [[system, user("One?")], [own, user("Two?")]]


def test_an_id_is_the_rows_own_or_belongs_to_its_text(write):
    rows = [{"prompt": "One?"}, {"prompt": "Two?", "id": 5}, {"prompt": "One?"}, {"prompt": "Six?", "id": 5}]
    first, *others = (prompt.id for prompt in read_prompts(write(rows)))
    assert len(first) == 16 and others == ["5", f"{first}-2", "5-2"]
    assert read_prompts(write([{"prompt": "Two?"}, {"prompt": "One?"}]))[1].id == first
    assert read_prompts(write(rows), system_prompt="Be brief.")[0].id != first


def test_only_the_first_are_read(write):
    assert messages(write("One?\nTwo?\nThree?", "prompts.txt"), limit=2) == [[user("One?")], [user("Two?")]]


def test_empty_prompts_are_counted_and_left_out(write, caplog):
    rows = [{"prompt": " "}, {"prompt": "One?"}, {"prompt": None}, {"messages": []}]
    assert messages(write(rows)) == [[user("One?")]]
    assert "3 empty ones are left out" in caplog.text


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([], "holds none"),
        ('{"prompt": "One?"}\n{"prompt"', "line 2 of .*prompts.jsonl' is not JSON"),
        ([["One?"]], "line 1 of .* must hold an object, got list"),
        ([{"prompt": "One?"}, {"text": "Two?"}], "line 2 of .* has no prompt or messages, it has text"),
        ([{"prompt": 3}], "must be a text or a list of messages, got int"),
        ([{"prompt": ["One?"]}], "must be a text or a list of messages, got list"),
        ([{"messages": TURNS}], "ends with the role 'assistant'"),
        ([{"messages": [{"role": "robot", "content": "One?"}]}], "has the role 'robot'; one of: system"),
        ([{"messages": [{"role": "user"}]}], "a message whose 'content' is None"),
        ([{"messages": [{"role": "user", "content": [{"type": "text"}]}]}], "a message whose 'content' is \\["),
        ([{"messages": [user("One?") | {"tool_calls": "x"}]}], "a message whose 'tool_calls' is 'x'"),
        ([{"prompt": "\ud83d"}], "line 1 of .* has half of a surrogate pair"),
    ],
)
def test_what_no_model_can_continue_is_an_error(write, rows, error):
    with pytest.raises(ValueError, match=f"^prompts: .*{error}"):
        read_prompts(write(rows))


def test_a_source_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="prompts: no file at .*nothing.jsonl'; pass the path"):
        read_prompts(str(tmp_path / "nothing.jsonl"))
    for name in ("nothing.parquet", "nothing"):
        with pytest.raises(ValueError, match=f"prompts: cannot read .*{name}', split 'train'") as error:
            read_prompts(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_a_dataset_without_the_column_is_an_error_that_names_those_it_has(tmp_path):
    Dataset.from_dict({"text": ["One?"], "id": [1]}).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(ValueError, match="has no column prompt or messages, it has text, id; pass --prompt_column"):
        read_prompts(str(tmp_path / "set.parquet"))


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    rows = '{"prompt": "One?"}\n' if name.endswith(".jsonl") else "One?\n"
    (tmp_path / name).write_text(rows, encoding="utf-8-sig")
    assert messages(str(tmp_path / name)) == [[user("One?")]]


@pytest.mark.parametrize("given", [{"revision": "v1"}, {"config": "en"}])
def test_a_file_has_neither_revision_nor_configuration(write, given):
    (value,) = given.values()
    with pytest.raises(ValueError, match=f"prompts: got the .* '{value}', but '.*prompts.jsonl' is local"):
        read_prompts(write([{"prompt": "One?"}]), **given)
