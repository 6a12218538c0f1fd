"""A matplotlib figure that a notebook shows and that saves sharply, with none of pyplot's global state."""

import io
from typing import Any

from matplotlib.figure import Figure

DPI, NOTEBOOK_DPI = 150, 100


class NotebookFigure(Figure):
    """A figure of `DPI` dots an inch, on a light ground; a cell of a notebook that ends in it shows it."""

    def __init__(self, size: tuple[float, float], title: str = "", **arguments: Any) -> None:
        """`size` is in inches; `title` stands above the figure, as it is: no formula."""
        super().__init__(figsize=size, dpi=DPI, layout="constrained", facecolor="white", **arguments)
        if title:
            self.suptitle(title, parse_math=False)

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png", dpi=NOTEBOOK_DPI)
        return image.getvalue()
