"""Takes the picture of a run's report that README.md shows: its explorer, as it is when the page opens.

    consistency-lens report outputs/tiny_stories && python model_cards/screenshot.py outputs/tiny_stories/report.html

needs playwright and a Chromium (`CHROMIUM` says where, if it is not on the path); `make keep` does both.
"""

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).resolve().parent / "tiny_stories" / "report.png"
NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT, SCALE, MARGIN = 1120, 640, 2, 8  # pixels of the page, and how many of the picture each has


def find_chromium() -> str | None:
    """The path of a Chromium on this machine; None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def take_picture(report: Path, picture: Path, chromium: str) -> None:
    """Writes a PNG of a report's explorer."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE)
        page.goto(report.resolve().as_uri())
        page.locator("#explorer").scroll_into_view_if_needed()
        top, whole = (page.locator(f"#explorer .{part}").bounding_box() for part in ("toolbar", "explorer"))
        clip = {
            "x": whole["x"] - MARGIN,
            "y": top["y"] + page.evaluate("scrollY") - MARGIN,
            "width": whole["width"] + 2 * MARGIN,
            "height": whole["y"] + whole["height"] - top["y"] + 2 * MARGIN,
        }
        page.screenshot(path=picture, clip=clip, full_page=True)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        parser.error("no Chromium here; install one (Debian: apt-get install chromium)")
    take_picture(arguments.report, arguments.picture, chromium)


if __name__ == "__main__":
    main()
