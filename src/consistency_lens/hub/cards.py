"""What all cards of published artifacts share: templates, names as others may read them, licence, citation.

Everything in a card is rendered from what was recorded; nothing in them is typed by hand.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .markdown import code, literal, plain, shell
from .upstream_license import UpstreamLicense

LIBRARY = "consistency-lens"
NOT_MEASURED, NOT_RECORDED = "not measured", "not recorded"
TAGS = (LIBRARY, "interpretability")


@cache
def environment() -> Environment:
    """The templates; a value that is missing is an error, never an empty place."""
    made = Environment(
        loader=PackageLoader(__package__, "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, whose own marks `plain` and `code` take care of
    )
    made.filters |= {"plain": plain, "code": code, "literal": literal, "shell": shell, "count": count}
    return made


def render(template: str, **values: Any) -> str:
    """Renders a template of `hub/templates`; what a template leaves out leaves no gap."""
    text = environment().get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def count(number: int | None) -> str:
    """A whole number with its thousands apart."""
    return NOT_MEASURED if number is None else f"{number:,}"


def hub_link(name: str, revision: str | None, prefix: str = "") -> str:
    """A repository of the Hub at its revision, linked; what is not on the Hub by its name alone."""
    if revision is None:
        return code(name)
    return f"[{plain(name)}](https://huggingface.co/{prefix}{name}), revision {code(revision)}"


def license_metadata(license: UpstreamLicense, base: str | None, revision: str | None) -> dict[str, Any]:
    """The licence in the head of a card, as the Hub wants it; empty where none is known.

    Args:
        base, revision: the model on the Hub whose licence it is, for a link that names a file of it.
    """
    if license.name is None:
        return {}
    found = {"license": license.name}
    if license.title is not None:
        found["license_name"] = license.title
    if license.link is not None:
        found["license_link"] = license_link(license.link, base, revision)
    return found


def license_link(link: str, base: str | None, revision: str | None) -> str:
    """An address where the licence is found; what is a file of the base model is there."""
    if "://" in link or base is None:
        return link
    return f"https://huggingface.co/{base}/blob/{revision or 'main'}/{link.lstrip('/')}"


def citation(versions: Mapping[str, str] | None) -> str:
    """BibTeX of the software, in the version that made an artifact."""
    version = (versions or {}).get("consistency_lens")
    lines = [
        "@software{consistency_lens,",
        "  author = {{The consistency-lens authors}},",
        "  title = {consistency-lens: read one activation of a language model in plain words, and check the words},",
        *([f"  version = {{{version}}},"] if version else []),
        "}",
    ]
    return "\n".join(lines)
