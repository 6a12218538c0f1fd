"""An explanation as a picture: each token, the lens's words for it, its FVE as colour, and predictions."""

import textwrap
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from ..explanation import Explanation, TokenExplanation, format_top
from ..optional_packages import require
from ..tuned_lens.heatmap import installed_fonts, visible
from .chart import AnyFigure
from .interactive import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from plotly.graph_objects import Figure as PlotlyFigure

COLOURS = "cividis"  # told apart by the colour-blind, and light and dark in grey too
CAPTION = "Colour: FVE from 0 (dark) to 1 (bright). Next: what the subject predicts, before and after the round trip."
COLUMNS = {"token": 0.0, "the lens's words": 0.14, "FVE": 0.53, "KL, nats": 0.6, "next, before": 0.71, "after": 0.86}
WIDTH, ROW, AROUND = 11.0, 0.32, 1.0  # inches
TOKEN_WIDTH, WORDS_WIDTH, NEXT_WIDTH = 14, 44, 15  # characters
MAX_TOKENS = 60  # of a picture: more cannot be read


def explanation(explained: Explanation, title: str = "", interactive: bool = False) -> AnyFigure:
    """A picture of what a lens says about a text, token by token.

    Args:
        explained: what `lens.explain` gives; of a long one pass a part,
            `Explanation(explained.text, explained.tokens[:40])`.
        title: above the picture.
        interactive: a plotly table that scrolls, of any length, in place of a figure of matplotlib.

    Raises:
        ValueError: if there are no tokens, or too many for a figure, or the library is not installed.
    """
    rows = list(explained)
    if not rows:
        raise ValueError("explanation: got no tokens; pass what lens.explain gives")
    if interactive:
        return table(rows, title)
    if len(rows) > MAX_TOKENS:
        raise ValueError(
            f"explanation: a picture has room for {MAX_TOKENS} tokens, got {len(rows)}; pass some, or interactive=True"
        )
    return picture(rows, title)


def picture(rows: Sequence[TokenExplanation], title: str = "") -> "Figure":
    require("matplotlib", extra="plots", needed_for="a figure")
    from matplotlib import colormaps

    from ..notebook_figure import NotebookFigure

    words = [textwrap.wrap(one_line(row.text), WORDS_WIDTH) or [""] for row in rows]
    heights = [max(1.0, 0.62 * len(lines)) for lines in words]
    figure = NotebookFigure((WIDTH, ROW * sum(heights) + AROUND), title)
    axes, fonts, colours = figure.subplots(), installed_fonts(), colormaps[COLOURS]
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(sum(heights) + 0.6, -1.2)
    for name, x in COLUMNS.items():
        axes.text(x, -0.7, name, fontweight="bold", va="center")
    below = -0.5
    for row, lines, height in zip(rows, words, heights, strict=True):
        y, below = below + height / 2, below + height
        shade = colours(share(row.fve))
        axes.text(
            0.004, y, shortened(token_of(row), TOKEN_WIDTH), va="center", parse_math=False,
            color="black" if sum(shade[:3]) > 1.5 else "white", family=["DejaVu Sans Mono", *fonts],
            bbox={"facecolor": shade, "edgecolor": "none", "boxstyle": "round,pad=0.2"},
        )  # fmt: skip
        tops = [shortened(likeliest(top), NEXT_WIDTH) for top in (row.top_before, row.top_after)]
        for x, cell in zip(list(COLUMNS.values())[1:], ("\n".join(lines), *numbers(row), *tops), strict=True):
            axes.text(x, y, cell, va="center", family=fonts, parse_math=False, linespacing=1.1)
    axes.text(0.0, below + 0.8, CAPTION, fontsize=8, color="dimgray", va="center")
    return figure


def table(rows: Sequence[TokenExplanation], title: str = "") -> "PlotlyFigure":
    figure = new_figure(title or "What the lens says, token by token", CAPTION, specs=[[{"type": "table"}]])
    from plotly.colors import sample_colorscale

    shades = sample_colorscale(COLOURS, [share(row.fve) for row in rows])
    plain = ["white"] * len(rows)
    inks = ["black" if share(row.fve) > 0.5 else "white" for row in rows]
    cells = [
        [token_of(row) for row in rows], [one_line(row.text) for row in rows],
        *zip(*(numbers(row) for row in rows), strict=True),
        [format_top(row.top_before) for row in rows], [format_top(row.top_after) for row in rows],
    ]  # fmt: skip
    figure.add_table(
        columnwidth=[10, 34, 7, 8, 26, 26],
        header={"values": [f"<b>{name}</b>" for name in COLUMNS], "align": "left", "fill": {"color": "#e9ecef"}},
        cells={
            "values": [[escape(cell) for cell in column] for column in cells],
            "align": ["left", "left", "right", "right", "left", "left"],
            "fill": {"color": [shades, *[plain] * (len(cells) - 1)]},
            "font": {"color": [inks, *[["black"] * len(rows)] * (len(cells) - 1)]},
            "height": 28,
        },
    )
    figure.update_layout(height=min(900, 28 * len(rows) + 240))
    return figure


def numbers(row: TokenExplanation) -> tuple[str, str]:
    return f"{row.fve:.2f}", f"{row.kl:.2f}"


def token_of(row: TokenExplanation) -> str:
    return visible(row.token.strip() or row.token)


def share(fve: float) -> float:
    return min(max(fve, 0.0), 1.0)


def one_line(text: str) -> str:
    return visible(text.strip(), spaces=False)


def likeliest(top: Sequence[tuple[str, float]]) -> str:
    token, probability = top[0]
    return f"{visible(token.strip() or token)} {probability:.0%}"


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
