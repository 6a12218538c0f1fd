import pytest
from markdown_it import MarkdownIt

from consistency_lens.hub.markdown import code, literal, plain, shell, table

TEXTS = [
    "a_b tiny_stories", "_so_ __x__ a_ _b", "*a* **b**", "`code` ``two``", "a|b", "<script>x</script>", "&lt; & &#42;",
    "[a](b) ![c](d)", "~~gone~~", "\\* \\| \\", "http://a.b www.c.d e@f.g", ":smile:", "$x$ $$y$$", "#1", "a # b",
]  # fmt: skip


def cells(markdown):
    """The texts of a table's cells, as they are shown."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    inline = [token for token in tokens if token.type == "inline"]
    kinds = {child.type for token in inline for child in token.children}
    assert kinds <= {"text", "text_special", "code_inline", "html_inline"}, kinds
    return ["".join(c.content for c in token.children if c.type != "html_inline") for token in inline]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("form", [plain, code])
def test_a_text_is_shown_as_it_is(form, text):
    assert cells(table(("a", "b"), [[form(text), "x"]], numbers=False)) == ["a", "b", text, "x"]


def test_what_ends_a_line_or_cannot_be_seen_is_shown():
    assert plain("a\nb\r\nc\x00\u202e\u2028\ud800é") == "a⏎b⏎c␀U+202EU+2028U+D800é"
    assert cells(table(("a",), [[plain("a   b")]])) == ["a", "a \xa0\xa0b"]


def test_literals_and_words_of_a_command_stay_on_their_line():
    assert literal('a"\n```') == '"a\\"\\n```"' and eval(literal("é\n\\")) == "é\n\\"
    assert shell("a b\nc; rm") == "'a b c; rm'" and shell("me/cache") == "me/cache"
