"""The report of 10,000 explained tokens in a headless Chromium: how long it takes to open, and how it scrolls.

It is open when a token is selected, its explanation stands beside it and the frame after that was drawn; the seconds
count from the start of the navigation. Then the texts are scrolled from top to bottom, as by a wheel, and the times
between frames are taken, and the tasks that kept the page from answering for 50 ms or more. The texts are made up, the
figures are those of the repository's own lens. Run with `python tests/benchmarks/report_page.py`; writes
`results/report_page.json`.
"""

import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from harness import RESULTS, machine, prepare

from consistency_lens.report.document import report_document
from consistency_lens.report.page import render_page
from consistency_lens.report.run_folder import read_run

ROOT = Path(__file__).parents[2]
RUNS, TEXTS, TOKENS = 5, 80, 125
SPEED = 3000  # pixels a second
GESTURE = {"speed": SPEED, "gestureSourceType": "mouse"}
WINDOW = {"width": 1280, "height": 900}
# Run before the page's own scripts.
WATCH = """
  window.longTasks = [];
  new PerformanceObserver(list => longTasks.push(...list.getEntries().map(of => of.duration)))
    .observe({type: "longtask", buffered: true});
  const look = () => {
    const isOpen = document.querySelector(".token[aria-selected=true]") && document.querySelector(".panel .word");
    requestAnimationFrame(isOpen ? () => { window.openAfter = performance.now(); } : look);
  };
  requestAnimationFrame(look);
"""
COUNT_FRAMES = """() => {
  window.longTasks = [];
  window.frameTimes = [];
  const step = now => { frameTimes.push(now); requestAnimationFrame(step); };
  requestAnimationFrame(step);
}"""
LEFT = "(flow => flow.scrollHeight - flow.scrollTop - flow.clientHeight)(explorer.flow)"
FRAMES = "() => frameTimes.slice(1).map((now, index) => now - frameTimes[index])"
# Every token is an element by then.
RECOLOUR = """() => new Promise(done => {
  const start = performance.now();
  explorer.setQuantity("kl");
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""


def write_page(folder: Path) -> Path:
    """The report as a file."""
    from report_documents import made_up_explorer

    run = read_run(ROOT / "model_cards" / "tiny_stories")
    path = folder / "report.html"
    path.write_text(render_page(report_document(run, made_up_explorer(TEXTS, TOKENS))), encoding="utf-8")
    return path


def look_at(browser: Any, path: Path) -> dict[str, Any]:
    """Opens the page anew, scrolls through it, and returns the milliseconds of all that."""
    page = browser.new_page(viewport=WINDOW)
    page.add_init_script(WATCH)
    page.goto(path.as_uri())
    page.wait_for_function("window.openAfter")
    page.wait_for_load_state("load")
    opened, opening_tasks = page.evaluate("[openAfter, longTasks]")
    flow = page.locator(".flow")
    flow.scroll_into_view_if_needed()
    box = flow.bounding_box()
    page.evaluate(COUNT_FRAMES)
    gestures = page.context.new_cdp_session(page)
    middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    left = before = float("inf")
    while left > 1:  # the height is not known before the end
        gestures.send("Input.synthesizeScrollGesture", {**middle, **GESTURE, "yDistance": -2 * SPEED})
        left, before = page.evaluate(LEFT), left
        if left == before:
            raise RuntimeError("the texts do not scroll")
    frames, scrolling_tasks = page.evaluate(f"[({FRAMES})(), longTasks]")
    tokens = page.locator(".token").count()
    recoloured = page.evaluate(RECOLOUR)
    page.close()
    return {
        "opened": opened, "opening_tasks": opening_tasks, "frames": frames, "scrolling_tasks": scrolling_tasks,
        "recoloured": recoloured, "tokens": tokens,
    }  # fmt: skip


def tenths(milliseconds: float) -> float:
    """As far as the browser's clock can tell."""
    return round(milliseconds, 1)


def summary(looks: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all runs, in milliseconds."""
    frames = sorted(frame for look in looks for frame in look["frames"])
    opened = [look["opened"] for look in looks]
    quantiles = statistics.quantiles(frames, n=100)
    return {
        "opened": {"median": tenths(statistics.median(opened)), "longest": tenths(max(opened))},
        "tasks_of_50_ms_while_opening": [sorted(look["opening_tasks"]) for look in looks],
        "frames_while_scrolling": {
            "count": len(frames), "median": tenths(quantiles[49]), "p95": tenths(quantiles[94]),
            "p99": tenths(quantiles[98]), "longest": tenths(frames[-1]),
        },
        "tasks_of_50_ms_while_scrolling": [sorted(look["scrolling_tasks"]) for look in looks],
        "all_tokens_in_another_colour": tenths(statistics.median(look["recoloured"] for look in looks)),
        "tokens_that_are_elements_after_scrolling": looks[-1]["tokens"],
    }  # fmt: skip


def main() -> None:
    """Looks at the page some times, and writes what was seen."""
    device = prepare()
    sys.path.insert(0, str(ROOT / "tests"))
    from browser import chromium

    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        path = write_page(Path(folder))
        look_at(browser, path)  # the browser itself is warm then
        looks = [look_at(browser, path) for _ in range(RUNS)]
        result = {
            "name": "report_page",
            "what": f"report of {TEXTS * TOKENS:,} explained tokens, {path.stat().st_size:,} bytes, in a window of "
            f"{WINDOW['width']} x {WINDOW['height']}, scrolled at {SPEED} pixels a second",
            "unit": "milliseconds",
            **summary(looks),
            "runs": RUNS,
            "machine": machine(device),
            "versions": {"python": platform.python_version(), "chromium": browser.version},
        }
    (RESULTS / "report_page.json").write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except pytest.skip.Exception as no_browser:
        sys.stdout.write(f"report_page: {no_browser}\n")
