"""Distinct-n, as a module of the `evaluate` library."""

from collections.abc import Sequence

import datasets
import evaluate
import torch

from consistency_lens.evaluation import metrics

DESCRIPTION = (
    "Distinct n-grams / n-grams over all texts together. It falls as their number grows: compare equal numbers."
)
CITATION = "Li et al. 2016, A Diversity-Promoting Objective Function for Neural Conversation Models"
INPUTS = """
Args:
    predictions: N texts of T token ids each.
    n: the length of an n-gram; 2 if not given.

Returns:
    distinct_n: in (0, 1]; 1 where texts are shorter than n.
"""


class DistinctN(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, predictions: Sequence[Sequence[int]], n: int = 2) -> dict[str, float]:
        lengths = {len(text) for text in predictions}
        if len(lengths) > 1:
            raise ValueError(f"distinct_n: texts must be of one length, got {min(lengths)} to {max(lengths)} tokens")
        return {"distinct_n": metrics.distinct_n(torch.tensor(predictions), n)}
