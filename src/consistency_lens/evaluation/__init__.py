"""Evaluation: metrics with their controls and intervals, samples, and tables of both."""

from .arguments import CHECKS, EvaluationArguments
from .controls import CONTROLS
from .evaluator import Evaluator, write_metrics
from .report import metrics_markdown, metrics_table, samples_table
from .samples import Sample, collect_samples, write_samples

__all__ = [
    "CHECKS",
    "CONTROLS",
    "EvaluationArguments",
    "Evaluator",
    "Sample",
    "collect_samples",
    "metrics_markdown",
    "metrics_table",
    "samples_table",
    "write_metrics",
    "write_samples",
]
