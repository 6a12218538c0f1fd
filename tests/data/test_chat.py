import pytest
from tiny_lenses import tiny_tokenizer

from consistency_lens.data.chat import chat_key, chat_template, chat_template_hash, read_messages, render_chat

HEADER = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} "
CONTENT = "{{ m['content'] }} {{ eos_token }}{% endfor %}"
PLAIN = HEADER + CONTENT
THINKS = HEADER + "{% if 'thinking' in m %}w90 {{ m['thinking'] }} w91 {% endif %}" + CONTENT
THINKS_LAST = HEADER + "{% if loop.last and 'thinking' in m %}w90 {{ m['thinking'] }} w91 {% endif %}" + CONTENT
REASONS = HEADER + "{% if m.reasoning_content %}w90 {{ m.reasoning_content.strip() }} w91 {% endif %}" + CONTENT

CHAT = [
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": "w4", "thinking": "w5 w6"},
    {"role": "user", "content": "w7"},
    {"role": "assistant", "content": "w8 w9", "thinking": "w9"},
]


def tokenizer(template):
    made = tiny_tokenizer()
    made.chat_template = template
    return made


class TestRendering:
    def test_thinking_is_kept_where_the_template_knows_it(self):
        chat = render_chat(tokenizer(THINKS), CHAT, "row 0")
        assert chat.text == (
            "<s>user w3 </s>assistant w90 w5 w6 w91 w4 </s>user w7 </s>assistant w90 w9 w91 w8 w9 </s>"
        )
        assert (chat.thinking, chat.thinking_dropped) == (2, 0)

    def test_a_template_may_keep_that_of_the_last_turn_alone(self):
        chat = render_chat(tokenizer(THINKS_LAST), CHAT, "row 0")
        assert "w90 w9 w91" in chat.text and (chat.thinking, chat.thinking_dropped) == (2, 1)

    def test_thinking_that_is_also_in_the_answer_counts_as_dropped_all_the_same(self):
        assert render_chat(tokenizer(PLAIN), CHAT[2:], "row 0").thinking_dropped == 1

    def test_other_names_of_thinking(self):
        chat = [{"role": "assistant", "content": "w4", "reasoning_content": "\nw5\n"}]
        rendered = render_chat(tokenizer(REASONS), chat, "row 0")
        assert rendered.text == "<s>assistant w90 w5 w91 w4 </s>" and rendered.thinking_dropped == 0
        assert render_chat(tokenizer(PLAIN), chat, "row 0").thinking_dropped == 1

    @pytest.mark.parametrize("key", ["thinking", "reasoning_content", "reasoning"])
    def test_a_template_gets_thinking_under_both_names_whatever_transformers_adds(self, monkeypatch, key):
        plain, given = tokenizer(PLAIN), []
        monkeypatch.setattr(plain, "apply_chat_template", lambda messages, tokenize: given.extend(messages))
        render_chat(plain, [{"role": "assistant", "content": "w4", key: "w5"}, {"role": "user", "content": "w6"}], "")
        assert given[0]["thinking"] == given[0]["reasoning_content"] == "w5"
        assert given[1] == {"role": "user", "content": "w6"}

    def test_no_thinking_is_none_to_drop(self):
        chat = [{"role": "user", "content": "w3", "thinking": " "}, {"role": "assistant", "content": "w4"}]
        assert render_chat(tokenizer(PLAIN), chat, "row 0")[1:] == (0, 0)

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{% for m in messages %}{{ 'a' + m['content'] }}{% endfor %}", "can only concatenate"),
        ],
    )
    def test_a_refusal_names_the_row(self, template, message):
        chat = [{"role": "user", "content": [{"type": "text", "text": "w3"}]}]
        with pytest.raises(ValueError, match=f"row 7: the chat template refuses the chat .*{message}"):
            render_chat(tokenizer(template), chat, "row 7")


class TestMessages:
    def test_keys_that_arrow_filled_in_are_left_out_in_any_depth(self):
        call = {"name": "f", "arguments": {"a": None, "b": 0}}
        messages = [{"role": "assistant", "content": "", "thinking": None, "tool_calls": [call]}]
        assert read_messages(messages, "row 0") == [
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"b": 0}}]}
        ]

    def test_no_messages(self):
        assert read_messages(None, "row 0") == read_messages([], "row 0") == []

    @pytest.mark.parametrize("value", ["a chat", {"role": "user"}, [["user", "w3"]], "x" * 1000])
    def test_what_is_no_list_of_messages_is_named(self, value):
        with pytest.raises(ValueError, match="row 3 holds .{1,60}; it must be a list of messages"):
            read_messages(value, "row 3")

    def test_a_message_without_a_role_is_named(self):
        with pytest.raises(ValueError, match="row 3: message 1 has no role but from, value"):
            read_messages([{"role": "user"}, {"from": "human", "value": "w3"}], "row 3")

    def test_the_key_of_a_chat_is_that_of_its_messages(self):
        assert chat_key([{"role": "user", "content": "é"}]) == chat_key([{"content": "é", "role": "user"}])
        assert chat_key(CHAT) != chat_key(CHAT[:3])


def test_a_tokenizer_without_a_template_is_named():
    with pytest.raises(ValueError, match="has no chat template; pass a chat model"):
        chat_template(tiny_tokenizer())


def test_templates_are_told_apart_by_their_hash():
    assert chat_template_hash(tokenizer(PLAIN)) == chat_template_hash(tokenizer(PLAIN))
    assert chat_template_hash(tokenizer(PLAIN)) != chat_template_hash(tokenizer(THINKS))
