"""A hook of mkdocs: pictures that lie elsewhere in the repository belong to the site too."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PICTURES = {
    "images/explanation.png": "model_cards/tiny_stories/explanation.png",
    "images/controls.png": "model_cards/tiny_stories/controls.png",
    "images/tuned_lens.png": "model_cards/tuned_lens_tiny_stories/sweep-overview.png",
}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pictures under the names that the pages have for them."""
    root = Path(config.config_file_path).parent
    for name, path in PICTURES.items():
        files.append(File.generated(config, name, abs_src_path=str(root / path)))
    return files
