"""One prompt through all layers: a heatmap of tokens by layers, as a figure and as a page to walk through."""

import unicodedata
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .plots import LENSES, LensRecords, new_figure
from .records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Quantity = Literal["kl", "entropy", "probability"]
# quantity -> what people read
QUANTITIES: Mapping[Quantity, str] = {
    "kl": "KL(P_final ‖ P_layer), bits",
    "entropy": "entropy of the reading, bits",
    "probability": "probability of the top token",
}
EMPTY = "⟨empty⟩"  # a token that decodes to nothing, such as the lone word boundary of SentencePiece
NAMED = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
# Control characters, marks that change the direction of text, separators but the space, halves of a pair, and what
# Unicode does not define: they show nothing of their own, or move their neighbours.
UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}
CELL, MARGIN, BAR = (0.62, 0.21), (0.7, 1.2), 5.0  # inches: a cell, what is about the cells, the bar of colours
SHOWN_TOKENS = 64  # a figure of more is wider than can be looked at; the page has them all
SIDE_BY_SIDE = 12  # tokens; of longer prompts the lenses stand one above the other
CELL_CHARACTERS = 8
DARK = 0.6  # share of the scale from which white can be read better than black
# Where matplotlib's own font lacks a character, whichever of these is installed.
FALLBACK_FONTS = ("Noto Sans", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Hebrew", "Arial Unicode MS")


def prompt_ids(records: Sequence[Record]) -> list[str]:
    """The prompts in their order."""
    return list(dict.fromkeys(record.prompt_id for record in records))


def heatmap_figure(records: LensRecords, prompt_id: str, quantity: Quantity = "kl", title: str = "") -> "Figure":
    """Tokens from left to right, layers from below, one panel a lens with one scale of colours; in each cell the token
    that the lens puts first, bold where it is the answer.

    Raises:
        ValueError: if the quantity or the prompt is unknown.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"heatmap: quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}")
    grids = {name: grid_of(of, prompt_id) for name, of in records.items()}
    shape = next(iter(grids.values())).shape
    tokens, layers, stacked = min(shape[1], SHOWN_TOKENS), shape[0], shape[1] > SIDE_BY_SIDE
    rows, columns = (len(grids), 1) if stacked else (1, len(grids))
    width, height = tokens * CELL[0] * columns, layers * CELL[1] * rows
    figure = new_figure((max(width + MARGIN[0], 6.0), height + MARGIN[1] * (rows + 1)), title)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    highest = max(value_of(record, quantity) for grid in grids.values() for record in grid.flat) or 1.0
    for axes, (name, grid) in zip(panels, grids.items(), strict=True):
        draw_grid(axes, grid[:, -SHOWN_TOKENS:], quantity, 1.0 if quantity == "probability" else highest)
        cut = f", last {tokens} of {shape[1]} tokens" if tokens < shape[1] else ""
        axes.set_title(f"{LENSES[name].label}{cut}", fontsize="medium")
    figure.colorbar(
        panels[0].images[0], ax=list(panels), label=QUANTITIES[quantity], location="bottom", aspect=30,
        shrink=min(1.0, BAR / figure.get_figwidth()), fraction=0.4 / figure.get_figheight(),
    )  # fmt: skip
    return figure


def heatmap_html(records: LensRecords, prompt_id: str, title: str = "") -> str:
    """The same as one page without any other file: every cell opens to the 20 likeliest tokens, KL, entropy and the
    rank of the answer; the lens and the quantity that colours the cells can be chosen, all from the keyboard too.

    Raises:
        ValueError: if the prompt is unknown.
    """
    from jinja2 import Environment, StrictUndefined

    first = grid_of(next(iter(records.values())), prompt_id)[0]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    source = files(__package__).joinpath("templates", "heatmap.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=visible(title, spaces=False) or "Tokens by layers",
        prompt_id=visible(prompt_id, spaces=False),
        prompt=visible(first[0].prompt, spaces=False),
        answer=next((visible(record.answer) for record in first if record.answer), None),
        lenses={name: LENSES[name].label for name in records},
        quantities=QUANTITIES,
        data=heatmap_data(records, prompt_id),
    )


def heatmap_data(records: LensRecords, prompt_id: str) -> dict[str, Any]:
    """What a page shows of one prompt.

    Returns:
        - `tokens`: the prompt's, as they are shown;
        - `lenses`: name -> layers from below -> tokens -> what `cell` gives;
        - `words`: the strings that cells name by their places.

    Raises:
        ValueError: if the prompt is unknown.
    """
    grids = {name: grid_of(of, prompt_id) for name, of in records.items()}
    words: dict[str, int] = {}
    lenses = {name: [[cell(record, words) for record in row] for row in grid] for name, grid in grids.items()}
    first = next(iter(grids.values()))[0]
    return {"tokens": [visible(record.token) for record in first], "lenses": lenses, "words": list(words)}


def grid_of(records: Sequence[Record], prompt_id: str) -> np.ndarray:
    """The records of a prompt, (L, S).

    Raises:
        ValueError: if the prompt is unknown, or lacks a layer at a position.
    """
    found = [record for record in records if record.prompt_id == prompt_id]
    if not found:
        known = prompt_ids(records)
        listed = ", ".join(map(repr, known[:20])) + (", ..." if len(known) > 20 else "")
        raise ValueError(f"prompt: no records of {prompt_id!r}; there are {listed or 'none at all'}")
    cells = {(record.layer, record.position): record for record in found}
    layers, positions = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    lacking = next(((x, y) for x in layers for y in positions if (x, y) not in cells), None)
    if lacking:
        raise ValueError(
            f"prompt {prompt_id!r}: no record of layer {lacking[0]} at position {lacking[1]}; run the sweep again"
        )
    grid = np.empty((len(layers), len(positions)), dtype=object)
    for row, layer in enumerate(layers):
        grid[row] = [cells[layer, position] for position in positions]
    return grid


def value_of(record: Record, quantity: Quantity) -> float:
    if quantity == "probability":
        return record.top20[0][2]
    return record.kl_from_final_bits if quantity == "kl" else record.entropy_bits


def cell(record: Record, words: dict[str, int]) -> dict[str, Any]:
    """What the page says of one cell; its tokens as places in `words`, which grows, for they recur in most cells."""
    top: list[float] = []
    for _, token, probability in record.top20:
        top += [words.setdefault(visible(token), len(words)), significant(probability)]
    bits = {
        "kl": record.kl_from_final_bits,
        "back": record.kl_to_final_bits,
        "entropy": record.entropy_bits,
        "teacher": record.teacher_entropy_bits,
        "cos": record.cos_to_final,
    }
    found: dict[str, Any] = {"layer": record.layer, "top": top, **{name: significant(of) for name, of in bits.items()}}
    if record.answer_rank is not None:
        found |= {"rank": record.answer_rank, "chance": significant(record.answer_probability or 0.0)}
    return found | ({"hit": True} if record.is_answer else {})


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def visible(text: str, spaces: bool = True) -> str:
    """A token whose every character can be seen and stays in its place; `spaces=False` leaves plain spaces."""
    if spaces and not text:
        return EMPTY
    shown = []
    for character in text:
        if character in NAMED and (spaces or character != " "):
            shown.append(NAMED[character])
        elif character != " " and unicodedata.category(character) in UNSEEN:
            shown.append(f"⟨U+{ord(character):04X}⟩")
        else:
            shown.append(character)
    return "".join(shown)


def draw_grid(axes: "Axes", grid: np.ndarray, quantity: Quantity, highest: float) -> None:
    """The cells of one lens, coloured from 0 to `highest`."""
    values = np.array([[value_of(record, quantity) for record in row] for row in grid])
    fonts = installed_fonts()
    axes.imshow(values, cmap="Blues", vmin=0, vmax=highest, origin="lower", aspect="auto")
    for (row, column), record in np.ndenumerate(grid):
        text = axes.text(
            column, row, shortened(visible(record.top20[0][1])), ha="center", va="center", fontsize=7, clip_on=True,
            color="white" if values[row, column] > DARK * highest else "black", parse_math=False, family=fonts,
            weight="bold" if record.is_answer else "normal",
        )  # fmt: skip
        text.set_in_layout(False)  # thousands of them, all inside the axes
    tokens = [shortened(visible(record.token), 2 * CELL_CHARACTERS) for record in grid[0]]
    axes.set_xticks(range(len(tokens)), tokens, rotation=45, ha="right", rotation_mode="anchor", fontsize=8,
                    parse_math=False, family=fonts)  # fmt: skip
    axes.set_yticks(range(len(grid)), [str(row[0].layer) for row in grid], fontsize=7)
    axes.set_ylabel("layer")
    axes.set_xlabel("token read")


def shortened(text: str, length: int = CELL_CHARACTERS) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def installed_fonts() -> list[str]:
    """matplotlib's own font, then what else is installed for other scripts."""
    from matplotlib import font_manager

    known = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in known)]
