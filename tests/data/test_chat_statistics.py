import pytest
from tiny_lenses import tiny_tokenizer

from consistency_lens.data.chat_answers import AnswerFiles
from consistency_lens.data.chat_client import Completion, PromptFailedError
from consistency_lens.data.chat_prompts import Prompt
from consistency_lens.data.chat_statistics import length_statistics, statistics_of

ASKED = [{"role": "system", "content": "w3 w4 w5"}, {"role": "user", "content": "w6 w7"}]
PROMPTS = [Prompt(name, ASKED) for name in ("one", "two", "three", "four")]


@pytest.fixture
def answers(tmp_path):
    """Three answers, the first of an earlier run, and a prompt that the server refuses."""
    with AnswerFiles(tmp_path, PROMPTS) as earlier:
        earlier.add(PROMPTS[0], Completion("w8", "w9 w10 w11 w12", False, "stop", 10, 9, 7))
    with AnswerFiles(tmp_path, PROMPTS) as answers:
        answers.add(PROMPTS[1], Completion("w8 w9 w10", None, True, "length", 20, 8, None))
        answers.add(PROMPTS[2], Completion("w8", "w9 w10", False, "stop", None, None, None))
        answers.fail(PROMPTS[3], PromptFailedError("status 400", 1, refused=True))
        yield answers


def counted(answers, counter, **arguments):
    found = statistics_of(answers, **arguments)["tokens"][counter]
    return {part: (lengths["count"], lengths["mean"], lengths["max"]) for part, lengths in found.items()}


def test_counts_are_of_all_runs(answers):
    statistics = statistics_of(answers, drop_truncated=True)
    del statistics["tokens"]
    assert statistics == {
        "prompts": 4, "answers": 3, "with_thinking": 2, "truncated": 1, "dropped": 1, "failed": 0, "skipped": 1,
    }  # fmt: skip
    assert statistics_of(answers)["dropped"] == 0 and (answers.added, answers.added_tokens) == (2, 8)


def test_the_servers_counts_are_taken_as_far_as_they_go(answers):
    assert counted(answers, "server") == {
        "prompt_and_system": (2, 15.0, 20),
        "thinking": (1, 7.0, 7),
        "content": (2, 5.0, 8),  # 9 - 7, and 8 without thinking
        "completion": (2, 8.5, 9),
    }


def test_a_tokenizer_counts_the_texts_alone(answers):
    assert counted(answers, "tokenizer", tokenizer=tiny_tokenizer()) == {
        "prompt": (3, 2.0, 2),
        "prompt_and_system": (3, 5.0, 5),
        "thinking": (2, 3.0, 4),
        "content": (3, 5 / 3, 3),
    }
    assert statistics_of(answers)["tokens"].keys() == {"server"}


def test_thinking_that_the_server_does_not_count_leaves_the_content_uncounted(tmp_path):
    with AnswerFiles(tmp_path, PROMPTS) as answers:
        answers.add(PROMPTS[0], Completion("w8", "w9", False, "stop", 10, 9, None))
        assert counted(answers, "server").keys() == {"prompt_and_system", "completion"}


def test_lengths_have_a_mean_a_median_and_a_tail():
    lengths = length_statistics([10, 60, 20])
    assert lengths == {"count": 3, "mean": 30.0, "median": 20.0, "p95": 56.0, "max": 60}
