"""A hook of mkdocs, for what the pages link to elsewhere in the repository: pictures come with the site, and what does
not stands there as words."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

OUTSIDE = re.compile(r"(!?)\[([^]]*)\]\(((?:\.\./)+(?:docker|examples|model_cards)(?:/[^)]*)?)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pictures that the pages show."""
    docs = Path(config.docs_dir)
    for page in sorted(docs.rglob("*.md")):
        for is_picture, _, target in OUTSIDE.findall(page.read_text(encoding="utf-8")):
            file = (page.parent / target).resolve()
            name = _name_in_site(file, docs)
            if is_picture and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_others: Any) -> str:
    """Leads to the pictures in the site, and nowhere that is not in it."""
    docs = Path(config.docs_dir)
    folder = (docs / page.file.src_uri).parent
    up = "../" * page.file.src_uri.count("/")

    def in_site(link: re.Match[str]) -> str:
        is_picture, text, target = link.groups()
        return f"![{text}]({up}{_name_in_site((folder / target).resolve(), docs)})" if is_picture else text

    return OUTSIDE.sub(in_site, markdown)


def _name_in_site(file: Path, docs: Path) -> str:
    return "images/" + "-".join(file.relative_to(docs.parent).parts)
