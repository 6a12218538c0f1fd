"""The evaluation of a lens on held-out rows: metrics, controls and checks, as they go into `metrics.json`."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..atomic_write import write_json
from ..cached_passes import evaluating
from ..data.activation_source import Rows, rows_at
from ..data.collator import ActivationCollator
from ..losses import kl_divergence
from ..modeling_consistency_lens import ConsistencyLensModel
from .ablation import ablation
from .arguments import EvaluationArguments
from .best_of_n import best_of_n
from .controls import Controls, ordinary_tokens, read_ids
from .evaluated import Batch, EvaluatedRows, check_finite, judge, training_sample
from .linear_probe import linear_probe
from .metrics import (
    bootstrap_sums,
    distinct_n,
    first_kept,
    last_kept,
    percentile_interval,
    share_recovered,
    squared_error,
    text_nll,
    unit_norm_errors,
    unused_token_share,
)
from .private_code import private_code
from .residual_vq import ResidualQuantiser
from .steering import edit_and_steer
from .text_length import text_length

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
# what of the metrics is a single number, and what a control has
FIGURES = (*STATISTICS, "distinct_2", "true_distinct_2", "unused_token_share", "true_unused_token_share")
WORTH = ("fve", "kl_recovered")


class Evaluator:
    """Measures a lens on rows that it was not trained on: `Evaluator(lens, rows, collator)()` gives the metrics.

    Texts are greedy. Every row costs one pass of the subject over its context, and one token for each reconstruction;
    checks come on top of that.

    Args:
        lens: with its tokenizer, subject and statistics. It is in evaluation mode while it is measured.
        rows: held-out rows of a cache that was made for this lens.
        collator: for the lens's T.
        arguments: the defaults if None.
        train_rows: rows of other documents, for the controls and checks that are fitted to such (`residual_vq`,
            `linear_probe`, `private_code`).

    Raises:
        ValueError: if there are no rows, the collator's T is not the lens's, or a control or a check that is asked
            for needs training rows and there are none.
    """

    primary_metric = "fve"
    greater_is_better = True

    def __init__(
        self,
        lens: ConsistencyLensModel,
        rows: Rows,
        collator: ActivationCollator,
        arguments: EvaluationArguments | None = None,
        train_rows: Rows | None = None,
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
        self.train_rows: Rows = [] if train_rows is None else train_rows
        self.collator = collator
        self.arguments = arguments if arguments is not None else EvaluationArguments()
        self.controls = self.arguments.chosen_controls(len(self.train_rows) > 0)

    @torch.no_grad()
    def __call__(self) -> dict[str, Any]:
        """The metrics, with the keys of `metrics.json`; KL in nats, perplexities a token, `seconds` of wall time.

        Raises:
            ValueError: if an activation or a result is not finite, naming what.
        """
        start = time.perf_counter()
        with evaluating(self.lens):
            evaluated = self.read()
            metrics = self.summarise(evaluated, self.measure(evaluated)) | self.run_checks(evaluated)
        seconds = time.perf_counter() - start
        return metrics | {"seconds": seconds, "samples_per_second": metrics["rows"] / seconds}

    def read(self) -> EvaluatedRows:
        """The chosen rows with the lens's texts. All texts come first: the shuffled control reads those of others."""
        lens, batches = self.lens, self.batches()
        bar = tqdm(batches, unit="batch", desc="texts", disable=self.arguments.disable_tqdm)
        texts = [lens.decode_ids(batch["activations"].to(lens.device)).cpu() for batch in bar]
        return EvaluatedRows(lens, batches, torch.cat(texts))

    def batches(self) -> list[Batch]:
        """The chosen rows, collated. Rows of like length share a batch, which saves the passes over padding."""
        count, limit = len(self.rows), self.arguments.rows
        if count > limit:
            chosen = np.sort(np.random.default_rng(self.arguments.seed).choice(count, size=limit, replace=False))
        else:
            chosen = np.arange(count)
        rows = sorted(rows_at(self.rows, chosen.tolist()), key=lambda row: int(row["position"]))
        size = self.arguments.batch_size
        batches = [self.collator(rows[start : start + size]) for start in range(0, len(rows), size)]
        for batch in batches:
            check_finite("the activations of the cache", batch["activations"])
        return batches

    @cached_property
    def training(self) -> Batch:
        """The training rows that `residual_vq` and `linear_probe` are fitted to."""
        return training_sample(self.train_rows, self.collator, self.arguments.training_rows, self.arguments.seed)

    @cached_property
    def quantiser(self) -> ResidualQuantiser:
        """That of `residual_vq`: it depends on the lens's statistics alone, not on what is trained."""
        lens, arguments = self.lens, self.arguments
        vectors = lens.encoder.normaliser.normalise(self.training["activations"].to(lens.device))
        vocab_size = lens.subject.model.config.get_text_config().vocab_size
        return ResidualQuantiser.fit(
            vectors, lens.config.num_text_tokens, vocab_size, arguments.seed, arguments.disable_tqdm
        )

    def measure(self, evaluated: EvaluatedRows) -> dict[str, Tensor]:
        """For every row the addends (N,) of the sums that the metrics are made of."""
        # KL recovered is measured from the mean, asked for or not.
        names = list(dict.fromkeys(["mean", *self.controls]))
        quantiser = self.quantiser if "residual_vq" in names else None
        controls = Controls(self.lens, names, evaluated.column("document"), self.arguments.seed, quantiser)
        columns: dict[str, list[Tensor]] = defaultdict(list)
        text_ids, text_mask = evaluated.text_ids.to(self.lens.device), evaluated.text_mask.to(self.lens.device)
        count, silent = len(evaluated.batches), self.arguments.disable_tqdm
        for rows, batch in tqdm(evaluated, total=count, unit="batch", desc="evaluation", disable=silent):
            reconstructions = {"lens": read_ids(self.lens, text_ids[rows])}
            reconstructions |= controls.reconstruct(batch, rows, text_ids)
            for name, values in self.row_values(batch, text_ids[rows], text_mask[rows], reconstructions).items():
                columns[name].append(values.cpu().double())
        joined = {name: torch.cat(values) for name, values in columns.items()}
        # The mean direction is that of all rows, so these two cannot be summed batch by batch.
        unit_norm = unit_norm_errors(joined.pop("target"), joined.pop("prediction"))
        return joined | dict(zip(("unit_norm_error", "unit_norm_variance"), unit_norm, strict=True))

    def row_values(
        self, batch: Batch, text_ids: Tensor, text_mask: Tensor, reconstructions: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Addends (B,) of one batch, and its A and Â (B, d) as `target` and `prediction`."""
        subject = self.lens.subject
        # Errors are taken on the CPU: they are in float64, which not every device has.
        target, mean, prediction = (t.cpu() for t in (batch["activations"], self.lens.mean, reconstructions["lens"]))
        original, logits = judge(subject, batch, torch.stack(list(reconstructions.values()), dim=1))
        original = original[:, 0]
        values = {
            "target": target,
            "prediction": prediction,
            "rows": torch.ones_like(batch["positions"]),
            "variance": squared_error(target, mean),
            "cosine": torch.cosine_similarity(target.double(), prediction.double(), dim=-1),
            "agreement": original.argmax(-1) == logits[:, 0].argmax(-1),
            **self.perplexity_values(batch, text_ids, text_mask),
        }
        for index, (name, reconstruction) in enumerate(reconstructions.items()):
            values[f"error.{name}"] = squared_error(target, reconstruction.cpu())
            values[f"kl.{name}"] = kl_divergence(original, logits[:, index])
        for name, tensor in values.items():
            check_finite(name, tensor)
        return values

    def perplexity_values(self, batch: Batch, text_ids: Tensor, text_mask: Tensor) -> dict[str, Tensor]:
        """Negative log-likelihoods (B,) of text and true tail, of as many tokens: the first ones cost the most."""
        subject, tail_mask = self.lens.subject, batch["tail_mask"]
        tokens = torch.minimum(text_mask.sum(dim=1), tail_mask.sum(dim=1))
        text_mask, tail_mask = first_kept(text_mask, tokens[:, None]), last_kept(tail_mask, tokens[:, None])
        return {
            "text_nll": text_nll(subject, text_ids, text_mask).sum(-1),
            "text_tokens": tokens,
            "tail_nll": text_nll(subject, batch["tail_ids"], tail_mask).sum(-1),
            "tail_tokens": tokens,
        }

    def summarise(self, evaluated: EvaluatedRows, columns: dict[str, Tensor]) -> dict[str, Any]:
        """Metrics, controls and intervals from the rows' addends."""
        arguments, documents = self.arguments, evaluated.column("document")
        text_ids, text_mask, vocabulary = evaluated.text_ids, evaluated.text_mask, ordinary_tokens(self.lens)
        # true text as long as the lens's, which may stop early
        tail_ids = evaluated.column("tail_ids")
        tail_mask = last_kept(evaluated.column("tail_mask"), text_mask.sum(dim=1, keepdim=True))
        sums = {name: column.sum() for name, column in columns.items()}
        resampled = bootstrap_sums(columns, documents, arguments.num_bootstrap, arguments.seed)
        return {
            **{name: float(statistic(sums)) for name, statistic in STATISTICS.items()},
            "distinct_2": distinct_n(text_ids, 2, text_mask),
            "true_distinct_2": distinct_n(tail_ids, 2, tail_mask),
            "unused_token_share": unused_token_share(text_ids, vocabulary, text_mask),
            "true_unused_token_share": unused_token_share(tail_ids, vocabulary, tail_mask),
            "rows": len(documents),
            "documents": len(documents.unique()),
            "controls": {name: self.control_figures(name, sums) for name in self.controls},
            "ci95": {
                **{name: list(percentile_interval(of_sums(resampled))) for name, of_sums in STATISTICS.items()},
                **{
                    f"controls.{name}.{metric}": list(percentile_interval(values))
                    for name in self.controls
                    for metric, values in worth_of(name, resampled).items()
                },
            },
        }

    def control_figures(self, name: str, sums: Sums) -> dict[str, float]:
        """FVE and KL recovered of a control, and the bits of one that is not made of text."""
        figures = {metric: float(value) for metric, value in worth_of(name, sums).items()}
        return figures | ({"bits": self.quantiser.bits} if name == "residual_vq" else {})

    def run_checks(self, evaluated: EvaluatedRows) -> dict[str, Any]:
        """Name -> result of each check that is asked for."""
        arguments, seed = self.arguments, self.arguments.seed
        calls: dict[str, Callable[[], dict[str, Any]]] = {
            "linear_probe": lambda: linear_probe(evaluated, self.training, seed),
            "private_code": lambda: private_code(
                evaluated,
                self.train_rows,
                self.collator,
                arguments.fresh_encoder_steps,
                arguments.fresh_encoder_learning_rate,
                seed,
                arguments.disable_tqdm,
            ),
            "best_of_n": lambda: best_of_n(evaluated, arguments.best_of, seed),
            "text_length": lambda: text_length(evaluated, arguments.num_bootstrap, seed),
            "ablation": lambda: ablation(evaluated, seed, arguments.check_rows),
            "steering": lambda: edit_and_steer(evaluated, seed, arguments.check_rows),
        }
        return {name: calls[name]() for name in arguments.checks}


def worth_of(name: str, sums: Sums) -> dict[str, Tensor]:
    """FVE and KL recovered of the reconstructions of a name."""
    return {
        "fve": share_recovered(sums[f"error.{name}"], sums["variance"]),
        "kl_recovered": share_recovered(sums[f"kl.{name}"], sums["kl.mean"]),
    }


def write_metrics(path: str | Path, metrics: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Writes metrics as JSON, with the resolved arguments of the run under `arguments`; whole or not at all.

    Raises:
        ValueError: if a metric is NaN or infinite, which JSON has no word for.
    """
    write_json(Path(path), {**metrics, "arguments": {**arguments}})
