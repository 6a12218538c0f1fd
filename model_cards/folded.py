"""What a page shows only to who opens it."""


def folded(summary: str, text: str) -> str:
    """Markdown below a line to click on, where the page is shown as HTML; everything where it is read as text."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text.strip()}\n\n</details>"
