"""Rows for a tiny lens, without a cache on disk; for the tests of evaluation."""

from tiny_lenses import NUM_TEXT_TOKENS
from tiny_models import random_tokens

from consistency_lens.data.collator import ActivationCollator
from consistency_lens.subject import Subject

BOS, ROWS_PER_DOCUMENT = 1, 2


def tiny_rows(subject: Subject, *lengths: int) -> list[dict]:
    """One row for a context of each length, BOS included; two rows in a row are of one document."""
    input_ids, attention_mask = random_tokens(*lengths)
    input_ids[:, 0] = BOS
    activations = subject.activations(input_ids, attention_mask)
    return [
        {
            "activation": activations[row, length - 1].numpy(),
            "input_ids": input_ids[row, :length].tolist(),
            "position": length - 1,
            "document": 100 + row // ROWS_PER_DOCUMENT,
            "row": 1000 + row,
        }
        for row, length in enumerate(lengths)
    ]


def tiny_collator() -> ActivationCollator:
    return ActivationCollator(pad_token_id=0, num_text_tokens=NUM_TEXT_TOKENS, bos_token_id=BOS)
