"""Cards of published artifacts, rendered from what was measured; nothing in them is typed by hand."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..atomic_write import write_text
from ..evaluation.report import metrics_markdown
from ..evaluation.samples import Sample
from ..modeling_consistency_lens import ConsistencyLensModel


def render(template: str, **values: Any) -> str:
    """Renders a template of `hub/templates`; a value that is missing is an error, never an empty place."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    source = files(__package__).joinpath("templates", template).read_text(encoding="utf-8")
    return environment.from_string(source).render(**values)


def write_lens_card(
    folder: Path, lens: ConsistencyLensModel, metrics: dict[str, Any], samples: Sequence[Sample]
) -> Path:
    """Writes `README.md`, the model card of a trained lens, into its folder."""
    base = lens.config.base_model_name_or_path
    text = render(
        "lens_card.md.jinja",
        name=folder.resolve().name,
        location=str(folder),
        base_on_hub=base if not Path(base).exists() else None,
        config=lens.config,
        train_rows=(lens.provenance or {}).get("train_rows", "not measured"),
        table=metrics_markdown(metrics),
        samples=list(samples),
    )
    path = folder / "README.md"
    write_text(path, text)
    return path
