from pathlib import Path

import pytest
from transformers import AutoTokenizer

from consistency_lens.report.pieces import token_class, token_pieces

MODEL = Path(__file__).parents[2] / "examples" / "tiny_stories"
TEXT = "Once upon a time, Lily said: “Café 42!”\nThe end. 🐶 ok"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_pieces_are_the_text(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) > 10
    plain = [piece for piece in pieces if "\ufffd" not in piece]
    assert "".join(plain).startswith("Once upon a time, Lily said: ") and " time" in plain


def test_a_space_that_decoding_drops_is_kept():
    class Dropping:
        """Drops the space before the first token, as SentencePiece tokenizers do."""

        def decode(self, ids):
            return "".join([" Once", " upon", "a"][token] for token in ids).removeprefix(" ")

    assert token_pieces(Dropping(), [0, 1, 2, 1]) == ["Once", " upon", "a", " upon"]


@pytest.mark.parametrize(
    ("piece", "before", "expected"),
    [
        (" dog", "the", "word"), ("gs", " do", "rest of a word"), ("The", "\n", "word"), ("s", "'", "word"),
        (" 42", " is", "number"), (".", " dog", "punctuation"), ("\n", ".", "white space"), (" ", "", "white space"),
        ("", "", "other"), ("\ufffd", "", "other"), (" né", "", "word"), ("猫", "犬", "rest of a word"),
    ],
)  # fmt: skip
def test_classes(piece, before, expected):
    assert token_class(piece, before) == expected
