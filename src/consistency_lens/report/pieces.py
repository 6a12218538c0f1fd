"""A text's tokens as the pieces of text that they are, and what kind of piece each is."""

from transformers import PreTrainedTokenizerBase

# Tokens before one that are decoded with it: a tokenizer may drop the space before the first of them.
BEFORE = 8

WORD, WORD_PIECE, NUMBER, PUNCTUATION = "word", "rest of a word", "number", "punctuation"
WHITE_SPACE, OTHER = "white space", "other"
CLASSES = (WORD, WORD_PIECE, NUMBER, PUNCTUATION, WHITE_SPACE, OTHER)


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds, its leading space kept; a part of a character is shown as the token alone is."""
    pieces = []
    for place, token in enumerate(ids):
        start = max(0, place - BEFORE)
        before, whole = str(tokenizer.decode(ids[start:place])), str(tokenizer.decode(ids[start : place + 1]))
        alone = place == 0 or not whole.startswith(before)
        pieces.append(str(tokenizer.decode([token])) if alone else whole[len(before) :])
    return pieces


def token_class(piece: str, before: str = "") -> str:
    """What kind of token a piece of text is, one of `CLASSES`; `before` is the piece before it."""
    core = piece.strip()
    if not core:
        return WHITE_SPACE if piece else OTHER
    if core[0].isalpha():
        goes_on = piece[0] == core[0] and before[-1:].isalpha()
        return WORD_PIECE if goes_on else WORD
    if core[0].isnumeric():
        return NUMBER
    # what a part of a character decodes to is no punctuation
    return OTHER if "\ufffd" in core else PUNCTUATION
