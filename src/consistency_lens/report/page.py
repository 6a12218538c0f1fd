"""The page of a report: one HTML file with everything in it, that asks no network for anything.

The policy in its head lets the page's own style and scripts run, known by their hashes, and nothing else: were text of
a model or a data set to become markup, it still could not run or reach out. It does not become markup: the page reads
it from JSON and puts it in as text.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

# in the order in which they are run
SCRIPTS = ("vendor/d3.min.js", "vendor/plot.min.js", "dom.js", "charts.js", "explorer.js", "heatmap.js", "report.js")
STYLE = "report.css"
LONGEST = 4000  # characters of any one text in the page
# The style that Observable Plot puts into each of its charts; of another version it is another.
PLOT_STYLE = """:where(.plot-d6a7b5) {
  --plot-background: white;
  display: block;
  height: auto;
  height: intrinsic;
  max-width: 100%;
}
:where(.plot-d6a7b5 text),
:where(.plot-d6a7b5 tspan) {
  white-space: pre;
}"""
# What ends a script element, or begins what is read in another way.
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def render_page(document: Mapping[str, Any], scripts: Sequence[str] = (), connects: bool = False) -> str:
    """The page of a report.

    Args:
        document: a `document.ReportDocument`.
        scripts: JavaScript to run after the page's own, such as what asks a server for more texts.
        connects: let them connect to the server that the page comes from.

    Returns:
        HTML.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style, sources = page_file(STYLE), [*map(page_file, SCRIPTS), *scripts]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    return environment.from_string(page_file("page.html.jinja")).render(
        title=shown(document["title"]),
        policy=policy(style, sources, connects),
        style=Markup(style),
        scripts=[Markup(checked_script(source)) for source in sources],
        report=Markup(embedded_json(document)),
    )


def page_file(name: str) -> str:
    """A file of the page, as it is in the package."""
    return files(__package__).joinpath("page", *name.split("/")).read_text(encoding="utf-8")


def policy(style: str, scripts: Sequence[str], connects: bool = False) -> str:
    """The Content-Security-Policy of a page with this style and these scripts."""
    parts = {
        "default-src": "'none'",
        "script-src": " ".join(map(hash_of, scripts)),
        "style-src": " ".join(map(hash_of, (style, PLOT_STYLE))),
        "img-src": "data:",  # the empty icon, so that no browser asks for one
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    if connects:
        parts["connect-src"] = "'self'"
    return "; ".join(f"{name} {value}" for name, value in parts.items())


def hash_of(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def checked_script(source: str) -> str:
    """A script that its element will end with, and no sooner.

    Raises:
        ValueError: if it holds what ends a script element or changes how one is read.
    """
    if "</script" in source.lower() or "<!--" in source:
        raise ValueError("page: a script holds '</script' or '<!--', which a page cannot have inside one; divide it")
    return source


def embedded_json(content: Any) -> str:
    """JSON for a script element: ASCII alone, with nothing that HTML gives a meaning to.

    Texts are cut to `LONGEST` characters; numbers that are not finite are null.
    """
    text = json.dumps(bounded(content), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escape in ESCAPES.items():
        text = text.replace(character, escape)
    return text


def bounded(content: Any) -> Any:
    """The same content with long texts cut, and None for NaN and infinity."""
    if isinstance(content, str):
        return content if len(content) <= LONGEST else content[:LONGEST] + "…"
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {bounded(str(key)): bounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [bounded(value) for value in content]
    return content


def shown(text: str) -> str:
    """A text that UTF-8 can hold: halves of characters are replaced."""
    return text[:LONGEST].encode("utf-8", "replace").decode("utf-8")
