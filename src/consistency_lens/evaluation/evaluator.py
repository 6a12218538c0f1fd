"""The evaluation of a lens on held-out rows: metrics, controls and intervals, as they go into `metrics.json`."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..atomic_write import write_json
from ..data.collator import ActivationCollator
from ..lens_decoder import evaluating
from ..losses import kl_divergence
from ..modeling_consistency_lens import ConsistencyLensModel
from .arguments import EvaluationArguments
from .controls import Controls, read_ids
from .evaluated import Batch, Rows, check_finite, judge, numbered
from .metrics import (
    bootstrap_sums,
    distinct_n,
    percentile_interval,
    share_recovered,
    squared_error,
    text_nll,
    unit_norm_errors,
)

Sums = Mapping[str, Tensor]

# Each metric as a function of sums over rows: its value and its interval come from one formula.
STATISTICS: dict[str, Callable[[Sums], Tensor]] = {
    "fve": lambda s: share_recovered(s["error.lens"], s["variance"]),
    "fve_nrm": lambda s: share_recovered(s["unit_norm_error"], s["unit_norm_variance"]),
    "cosine": lambda s: s["cosine"] / s["rows"],
    "kl": lambda s: s["kl.lens"] / s["rows"],
    "kl_recovered": lambda s: share_recovered(s["kl.lens"], s["kl.mean"]),
    "top1_agreement": lambda s: s["agreement"] / s["rows"],
    "text_perplexity": lambda s: (s["text_nll"] / s["text_tokens"]).exp(),
    "true_text_perplexity": lambda s: (s["tail_nll"] / s["tail_tokens"]).exp(),
    "perplexity_ratio": lambda s: (s["text_nll"] / s["text_tokens"] - s["tail_nll"] / s["tail_tokens"]).exp(),
}


class Evaluator:
    """Measures a lens on rows that it was not trained on: `Evaluator(lens, rows, collator)()` gives the metrics.

    Texts are greedy. Every row costs one pass of the subject over its context, and one token for each reconstruction.

    Args:
        lens: with its tokenizer, subject and statistics. It is in evaluation mode while it is measured.
        rows: held-out rows of a cache that was made for this lens.
        collator: for the lens's T.
        arguments: the defaults if None.

    Raises:
        ValueError: if there are no rows, or the collator's T is not the lens's.
    """

    primary_metric = "fve"
    greater_is_better = True

    def __init__(
        self,
        lens: ConsistencyLensModel,
        rows: Rows,
        collator: ActivationCollator,
        arguments: EvaluationArguments | None = None,
    ) -> None:
        if len(rows) == 0:
            raise ValueError("evaluation: got no rows; hold out more documents")
        if collator.num_text_tokens != lens.config.num_text_tokens:
            raise ValueError(
                f"evaluation: the collator has num_text_tokens={collator.num_text_tokens}, the lens "
                f"{lens.config.num_text_tokens}; make a collator for the lens"
            )
        self.lens = lens
        self.rows = rows
        self.collator = collator
        self.arguments = arguments if arguments is not None else EvaluationArguments()

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        """The metrics, with the keys of `metrics.json`; KL in nats, perplexities a token, `seconds` of wall time.

        Raises:
            ValueError: if an activation or a result is not finite, naming what.
        """
        start = time.perf_counter()
        with evaluating(self.lens):
            batches = self.batches()
            documents = torch.cat([batch["document"] for batch in batches])
            text_ids, columns = self.measure(batches, documents)
        metrics = self.summarise(columns, documents, text_ids)
        seconds = time.perf_counter() - start
        return metrics | {"seconds": seconds, "samples_per_second": len(documents) / seconds}

    def batches(self) -> list[Batch]:
        """The chosen rows, collated. Rows of like length share a batch, which saves the passes over padding."""
        count, limit = len(self.rows), self.arguments.rows
        if count > limit:
            chosen = np.sort(np.random.default_rng(self.arguments.seed).choice(count, size=limit, replace=False))
        else:
            chosen = np.arange(count)
        rows = sorted((self.rows[int(index)] for index in chosen), key=lambda row: int(row["position"]))
        size = self.arguments.batch_size
        batches = [self.collator(rows[start : start + size]) for start in range(0, len(rows), size)]
        for batch in batches:
            check_finite("the activations of the cache", batch["activations"])
        return batches

    def measure(self, batches: list[Batch], documents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The decoder's texts (N, T), and for every row the addends (N,) of the sums that the metrics are made of."""
        lens, arguments = self.lens, self.arguments
        # KL recovered is measured from the mean, asked for or not.
        names = list(dict.fromkeys(["mean", *arguments.controls]))
        controls = Controls(lens, names, documents, arguments.seed)
        texts: list[Tensor] = []
        columns: dict[str, list[Tensor]] = defaultdict(list)
        with tqdm(total=2 * len(documents), unit="row", desc="evaluation", disable=arguments.disable_tqdm) as bar:
            # All texts come first: the shuffled control reads those of other batches.
            for batch in batches:
                texts.append(lens.decode_ids(batch["activations"].to(lens.device)))
                bar.update(len(batch["activations"]))
            text_ids = torch.cat(texts)
            for rows, batch in numbered(batches):
                batch = {name: tensor.to(lens.device) for name, tensor in batch.items()}
                reconstructions = {"lens": read_ids(lens, text_ids[rows])}
                reconstructions |= controls.reconstruct(batch, rows, text_ids)
                for name, values in self.row_values(batch, text_ids[rows], reconstructions).items():
                    columns[name].append(values.cpu().double())
                bar.update(len(batch["activations"]))
        joined = {name: torch.cat(values) for name, values in columns.items()}
        # The mean direction is that of all rows, so these two cannot be summed batch by batch.
        unit_norm = unit_norm_errors(joined.pop("target"), joined.pop("prediction"))
        return text_ids.cpu(), joined | dict(zip(("unit_norm_error", "unit_norm_variance"), unit_norm, strict=True))

    def row_values(self, batch: Batch, text_ids: Tensor, reconstructions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Addends (B,) of one batch, and its A and Â (B, d) as `target` and `prediction`."""
        subject = self.lens.subject
        # Errors are taken on the CPU: they are in float64, which not every device has.
        target, mean, prediction = (t.cpu() for t in (batch["activations"], self.lens.mean, reconstructions["lens"]))
        context, logits = judge(subject, batch, torch.stack(list(reconstructions.values()), dim=1))
        original = context.logits[:, 0]
        values = {
            "target": target,
            "prediction": prediction,
            "rows": torch.ones_like(batch["positions"]),
            "variance": squared_error(target, mean),
            "cosine": torch.cosine_similarity(target.double(), prediction.double(), dim=-1),
            "agreement": original.argmax(-1) == logits[:, 0].argmax(-1),
            "text_nll": text_nll(subject, text_ids).sum(-1),
            "text_tokens": torch.full_like(batch["positions"], text_ids.shape[1]),
            "tail_nll": text_nll(subject, batch["tail_ids"], batch["tail_mask"]).sum(-1),
            "tail_tokens": batch["tail_mask"].sum(-1),
        }
        for index, (name, reconstruction) in enumerate(reconstructions.items()):
            values[f"error.{name}"] = squared_error(target, reconstruction.cpu())
            values[f"kl.{name}"] = kl_divergence(original, logits[:, index])
        for name, tensor in values.items():
            check_finite(name, tensor)
        return values

    def summarise(self, columns: dict[str, Tensor], documents: Tensor, text_ids: Tensor) -> dict[str, Any]:
        """Metrics, controls and intervals from the rows' addends."""
        arguments = self.arguments
        sums = {name: column.sum() for name, column in columns.items()}
        resampled = bootstrap_sums(columns, documents, arguments.num_bootstrap, arguments.seed)
        return {
            **{name: float(statistic(sums)) for name, statistic in STATISTICS.items()},
            "distinct_2": distinct_n(text_ids, 2),
            "rows": len(documents),
            "documents": len(documents.unique()),
            "controls": {
                name: {
                    "fve": float(share_recovered(sums[f"error.{name}"], sums["variance"])),
                    "kl_recovered": float(share_recovered(sums[f"kl.{name}"], sums["kl.mean"])),
                }
                for name in arguments.controls
            },
            "ci95": {name: list(percentile_interval(of_sums(resampled))) for name, of_sums in STATISTICS.items()},
        }


def write_metrics(path: str | Path, metrics: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Writes metrics as JSON, with the resolved arguments of the run under `arguments`; whole or not at all.

    Raises:
        ValueError: if a metric is NaN or infinite, which JSON has no word for.
    """
    write_json(Path(path), {**metrics, "arguments": {**arguments}})
