"""Plots of lenses, runs and sweeps: `from consistency_lens import plots`.

Each function gives a matplotlib figure, to save or to end a notebook's cell with, or with `interactive=True` one of
plotly (`pip install "consistency-lens[plots]"`).
"""

from .explanations import explanation
from .layers import depth, heatmap
from .runs import best_of_n_texts, controls, fve_against_tokens, token_profiles, training_curves

__all__ = [
    "best_of_n_texts",
    "controls",
    "depth",
    "explanation",
    "fve_against_tokens",
    "heatmap",
    "token_profiles",
    "training_curves",
]
