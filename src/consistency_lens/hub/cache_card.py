"""The data set card of a published activation cache, rendered from its provenance and from what was measured."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from ..atomic_write import write_text
from ..data.cache_columns import TEXT_COLUMN
from ..data.cache_description import corpus_facts
from .cards import TAGS, citation, hub_link, render
from .markdown import plain, table

CACHE_TAGS = (*TAGS, "activations")
SIZES = [10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9, 10**10, 10**11, 10**12]
SIZE_NAMES = [
    "n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B",
    "100B<n<1T", "n>1T",
]  # fmt: skip


def write_cache_card(
    folder: Path,
    repo: str,
    provenances: Mapping[str, Mapping[str, Any]],
    descriptions: Mapping[str, Mapping[str, Any]],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    features: Features,
    license: str | None = None,
    language: Sequence[str] = (),
) -> Path:
    """Writes `README.md`, the card of an activation cache as a data set, into the folder that is published.

    Args:
        repo: id of the data set.
        provenances: of each split, as they are published.
        descriptions: of each split, from `data.cache_description.describe_cache`.
        records: of each split's parquet files, with `rows`, `bytes` and `num_bytes`.
        features: of the parquet files.
    """
    provenance = next(iter(provenances.values()))
    description = next(iter(descriptions.values()))
    rows = [
        (split, *(f"{of[name]:,}" for name in ("rows", "documents", "context_tokens")), f"{of['disk']['bytes']:,}")
        for split, of in descriptions.items()
    ]
    norm_names = list(description["norm"])
    norm_rows = [(split, *(f"{of['norm'][name]:.4g}" for name in norm_names)) for split, of in descriptions.items()]
    text = render(
        "cache_card.md.jinja",
        metadata=cache_metadata(provenance, records, features, license, language),
        name=repo.rpartition("/")[2],
        folder=f"data/{repo.rpartition('/')[2]}",
        repo=repo,
        license=license,
        subject=hub_link(provenance["subject"], provenance["subject_revision"]),
        dataset=hub_link(provenance["dataset"], provenance["dataset_revision"], "datasets/"),
        provenance=provenance,
        corpus=[(label, plain(value)) for label, value in corpus_facts(provenance)],
        citation=citation(provenance.get("versions")),
        sequences={split: of["sequences"] for split, of in provenances.items()},
        seen=provenances.get("validation", {}).get("seen_in_training"),
        columns={name: column_meaning(name, provenance) for name in features},
        splits=table(("split", "rows", "documents", "tokens in contexts", "bytes as Arrow"), rows),
        norms=table(("split", *norm_names), norm_rows),
        outliers={split: of["outliers"] for split, of in descriptions.items()},
        first_split=next(iter(descriptions)),
    )
    path = folder / "README.md"
    write_text(path, text)
    return path


def cache_metadata(
    provenance: Mapping[str, Any],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    features: Features,
    license: str | None,
    language: Sequence[str],
) -> str:
    """The YAML head of a cache's card, by the Hub's specification of data set cards."""
    name, num_rows = "default", sum(record["rows"] for of in records.values() for record in of)
    splits = {
        split: SplitInfo(split, sum(record["num_bytes"] for record in of), sum(record["rows"] for record in of))
        for split, of in records.items()
    }
    info = DatasetInfo(
        features=features,
        splits=SplitDict(splits),
        download_size=sum(record["bytes"] for of in records.values() for record in of),
        dataset_size=sum(split.num_bytes for split in splits.values()),
    )
    on_hub = provenance["subject_revision"] is not None
    card = DatasetCardData(
        language=list(language) or None,
        license=license,
        tags=[*CACHE_TAGS, *([provenance["subject"]] if on_hub else [])],
        size_categories=[size_category(num_rows)],
        source_datasets=[provenance["dataset"]] if provenance["dataset_revision"] is not None else None,
    )
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    MetadataConfigs({name: {"data_files": files}}).to_dataset_card_data(card)
    DatasetInfosDict({name: info}).to_dataset_card_data(card)
    return card.to_yaml()


def size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    for (low, below), name in zip(pairwise([0, *SIZES]), SIZE_NAMES, strict=False):
        if low <= rows < below:
            return name
    return SIZE_NAMES[-1]


def column_meaning(name: str, provenance: Mapping[str, Any]) -> str:
    """What a column of a cache holds."""
    meanings = {
        "activation": f"output of block {provenance['layer']} at token P, {provenance['width']} numbers",
        "input_ids": "tokens 0..P of the context, P included",
        "position": "P",
        "document": "hash of the document's text: rows of one document share it",
        TEXT_COLUMN: "the context, decoded, for reading",
    }
    return f"{meanings[name]} ({provenance['dtype']})" if name == "activation" else meanings[name]
