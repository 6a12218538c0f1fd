"""Fraction of variance explained, as a module of the `evaluate` library."""

from collections.abc import Sequence

import datasets
import evaluate
import torch

from consistency_lens.evaluation import metrics

DESCRIPTION = "Fraction of variance explained: 1 - sum |A - Â|² / sum |A - mu|², sums over all rows and dimensions."
INPUTS = """
Args:
    references: the activations A, N lists of d numbers.
    predictions: the reconstructions Â, of the same shape.
    mean: mu, d numbers: the mean activation of the training rows, not of these.

Returns:
    fve: 1 for the identity, 0 for the mean, negative where the mean would be better.
"""


class FVE(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        vector = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": vector, "references": vector}),
        )

    def _compute(
        self, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]], mean: Sequence[float]
    ) -> dict[str, float]:
        target, prediction = torch.tensor(references), torch.tensor(predictions)
        return {"fve": float(metrics.fve(target, prediction, torch.as_tensor(mean, dtype=torch.float64)))}
