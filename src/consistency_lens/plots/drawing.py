"""One chart, drawn as it is asked for."""

from . import interactive as with_plotly
from . import static
from .chart import AnyFigure, Chart


def drawn(chart: Chart, interactive: bool) -> AnyFigure:
    """A matplotlib figure, or a plotly one.

    Raises:
        ValueError: if the library is not installed.
    """
    return with_plotly.draw(chart) if interactive else static.draw(chart)
