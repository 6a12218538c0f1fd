"""Prompt suites: the default one, files, mistakes, and how an answer becomes a token."""

import json
import logging

import pytest
from tiny_lenses import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from consistency_lens.tuned_lens.suite import (
    CONTROL,
    FACTUAL,
    Prompt,
    read_suite,
    suite_hash,
    suite_of_texts,
    tokenise_suite,
)

SPACE = "Ġ"


def byte_tokenizer():
    """Byte-level pieces, a word with its leading space; BOS before a text and EOS after it."""
    merges = [(SPACE, "P"), (SPACE + "P", "a"), (SPACE + "Pa", "r"), ("i", "s"), (SPACE + "Par", "is")]
    tokens = ["<unk>", "<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet(), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokenised(text, answer, tokenizer=None):
    (found,) = tokenise_suite([Prompt("p", text, answer)], tokenizer or byte_tokenizer())
    return found


def write(folder, content, name="suite.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class TestSuitesThatShip:
    @pytest.mark.parametrize("name", ["default", "stories"])
    def test_have_20_prompts_factual_and_controls(self, name):
        suite = read_suite(name)
        kinds = [prompt.kind for prompt in suite]
        assert (len(suite), kinds.count(FACTUAL), kinds.count(CONTROL)) == (20, 15, 5)
        assert all(bool(prompt.answer) == (prompt.kind == FACTUAL) for prompt in suite)

    def test_are_known_by_their_hashes(self):
        default = read_suite()
        assert default == read_suite("default") != read_suite("stories")
        assert suite_hash(default) == suite_hash(read_suite()) != suite_hash(default[::-1])


class TestFiles:
    ENTRIES = [{"text": "a b", "answer": "c"}, {"id": "mine", "text": "d e"}]
    PROMPTS = [Prompt("prompt-1", "a b", "c", FACTUAL), Prompt("mine", "d e", None, CONTROL)]

    def test_a_json_list(self, tmp_path):
        assert read_suite(write(tmp_path, self.ENTRIES)) == self.PROMPTS

    def test_json_lines(self, tmp_path):
        lines = "\n".join(json.dumps(entry) for entry in self.ENTRIES) + "\n"
        assert read_suite(write(tmp_path, lines, "suite.jsonl")) == self.PROMPTS

    def test_a_prompt_a_line(self, tmp_path):
        expected = [Prompt("prompt-1", "a b"), Prompt("prompt-2", "d e")]
        assert read_suite(write(tmp_path, "a b\n\nd e\n", "suite.txt")) == expected == suite_of_texts(["a b", "d e"])

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ([], "has no prompts; write at least one"),
            ({"text": "a"}, "must hold a list of prompts, got dict"),
            (["a"], "prompt 1 must be an object with 'text', got str"),
            ([{"answer": "a"}], "prompt 1 has no 'text'"),
            ([{"text": "a", "anser": "b"}], "prompt 1 has the unknown key 'anser'; known are id, text, answer, kind"),
            ([{"text": "a", "id": "x"}, {"text": "b", "id": "x"}], "2 prompts with the id 'x'; give each its own"),
            ([{"text": " \n"}], "prompt 'prompt-1': text is blank"),
            ([{"text": "a", "answer": " "}], "prompt 'prompt-1': answer is blank"),
            ([{"text": "a", "answer": 4}], "prompt 'prompt-1': answer must be text, got 4"),
            ([{"text": "a", "kind": "song"}], "kind must be one of factual, control, free, got 'song'"),
            ([{"text": "a", "kind": "factual"}], "a factual prompt needs an answer"),
        ],
    )
    def test_mistakes_are_told_in_one_line(self, tmp_path, entries, message):
        with pytest.raises(ValueError, match=".") as error:
            read_suite(write(tmp_path, entries))
        assert message in str(error.value) and "\n" not in str(error.value)

    def test_what_is_no_json_or_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            read_suite(write(tmp_path, "[{"))
        with pytest.raises(ValueError, match="no file at .*; pass default or stories, or a .json"):
            read_suite(tmp_path / "none.json")
        for name in ("empty.txt", "empty.jsonl"):
            with pytest.raises(ValueError, match="has no prompts"):
                read_suite(write(tmp_path, "\n" if name.endswith("txt") else "", name))

    def test_texts_of_the_command_line(self):
        with pytest.raises(ValueError, match="the command line has no prompts"):
            suite_of_texts([])
        with pytest.raises(ValueError, match="'prompt-2': text is blank"):
            suite_of_texts(["a", " "])


class TestAnswers:
    def test_is_the_token_with_its_leading_space(self):
        tokenizer = byte_tokenizer()
        found = tokenised("it is", "Paris", tokenizer)
        assert tokenizer.convert_ids_to_tokens(found.answer_ids) == [SPACE + "Paris"]
        assert found.answer_is_one_token is True

    def test_the_prompt_has_bos_and_no_eos(self):
        found = tokenised("is", "Paris")
        assert found.ids[0] == 1 and 2 not in found.ids

    def test_stands_alone_for_a_tokenizer_without_spaces(self):
        tokenizer = tiny_tokenizer()
        assert tokenised("w3 w4", "w5", tokenizer).answer_ids == (5,)

    @pytest.mark.parametrize(("text", "answer"), [("it is", " Paris"), ("it is ", "Paris")])
    def test_no_second_space_is_put_between(self, text, answer):
        tokenizer = byte_tokenizer()
        pieces = tokenizer.convert_ids_to_tokens(tokenised(text, answer, tokenizer).answer_ids)
        assert "".join(pieces).removeprefix(SPACE) == "Paris"

    def test_is_tokenised_alone_where_it_grows_together_with_the_prompt(self):
        # the trailing space is a token of the prompt, and the first piece of " Paris" in the two together
        tokenizer = byte_tokenizer()
        pieces = tokenizer.convert_ids_to_tokens(tokenised("it is ", "Paris", tokenizer).answer_ids)
        assert pieces == ["P", "a", "r", "is"]

    def test_of_several_tokens_counts_by_its_first_and_is_named(self, caplog):
        with caplog.at_level(logging.WARNING):
            found = tokenised("w3", "w5 w6", tiny_tokenizer())
        assert (found.answer_id, found.answer_is_one_token) == (5, False)
        assert "answers of several tokens, the first of which is looked for: p" in caplog.text

    def test_that_the_tokenizer_does_not_know_is_none_and_is_named(self, caplog):
        with caplog.at_level(logging.WARNING):
            found = tokenised("w3", "Paris", tiny_tokenizer())
        assert (found.answer_id, found.answer_is_one_token) == (None, None)
        assert "answers that the tokenizer does not know, read as prompts without one: p" in caplog.text

    def test_many_names_are_cut_short(self, caplog):
        prompts = [Prompt(f"p{i}", "w3", "w5 w6") for i in range(8)]
        with caplog.at_level(logging.WARNING):
            tokenise_suite(prompts, tiny_tokenizer())
        assert caplog.messages[0].endswith("p0, p1, p2, p3, p4, p5 and 2 more")


def test_a_prompt_without_tokens_or_beyond_the_context_is_an_error():
    with pytest.raises(ValueError, match="prompt 'p': it has 3 tokens, the model reads 2"):
        tokenise_suite([Prompt("p", "w3 w4 w5")], tiny_tokenizer(bos=False), context=2)
    without_a = byte_tokenizer()
    without_a.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    with pytest.raises(ValueError, match="prompt 'p': 'a' has no tokens"):
        tokenise_suite([Prompt("p", "a")], without_a)
