"""Evaluated rows of a tiny lens; for the tests of the evaluation's checks."""

import torch
from evaluation_rows import tiny_collator, tiny_rows

from consistency_lens import ConsistencyLensModel
from consistency_lens.evaluation.evaluated import EvaluatedRows

LENGTHS = (12, 9, 3, 7, 12, 8, 4, 15, 11, 6)


def evaluated_rows(lens: ConsistencyLensModel, *lengths: int, batch_size: int = 4) -> EvaluatedRows:
    """Rows of the given lengths (by default `LENGTHS`) with the lens's greedy texts."""
    rows, collator = tiny_rows(lens.subject, *(lengths or LENGTHS)), tiny_collator()
    batches = [collator(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return EvaluatedRows(lens, batches, torch.cat([lens.decode_ids(batch["activations"]) for batch in batches]))
