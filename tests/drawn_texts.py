"""What stands where in a figure of matplotlib."""

from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text


def no_text_covers_another(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> int:
    """Asserts that every text lies inside the figure and none on another; returns how many there are."""
    figure.draw_without_rendering()  # the layout is known after the first time
    drawn: list[Text] = []
    draw = Text.draw

    def seen(text: Text, *args: Any) -> None:
        drawn.append(text)
        draw(text, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", seen)
        figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn if text.get_visible() and text.get_text()]
    for index, (name, box) in enumerate(boxes):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{name!r} is cut off"
        for other, second in boxes[index + 1 :]:
            assert not box.overlaps(second), f"{name!r} covers {other!r}"
    return len(boxes)
