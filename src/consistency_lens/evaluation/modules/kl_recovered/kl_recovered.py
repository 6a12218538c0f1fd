"""KL recovered, as a module of the `evaluate` library."""

from collections.abc import Sequence

import datasets
import evaluate
import torch

from consistency_lens.evaluation import metrics

DESCRIPTION = "KL recovered: 1 - sum KL(p(.|A) || p(.|Â)) / sum KL(p(.|A) || p(.|mu)), sums over all rows."
INPUTS = """
Args:
    predictions: KL(p(.|A) || p(.|Â)) in nats of each row, N numbers.
    references: KL(p(.|A) || p(.|mu)) of each row, with the mean activation mu in place of A.

Returns:
    kl_recovered: 1 is perfect, 0 no better than the mean activation.
"""


class KLRecovered(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        kl, kl_mean = (torch.tensor(column, dtype=torch.float64) for column in (predictions, references))
        return {"kl_recovered": float(metrics.kl_recovered(kl, kl_mean))}
