"""The columns of an activation cache, as Arrow shards and as parquet."""

from datasets import Features, List, Value

TEXT_COLUMN = "text"


def cache_features(width: int, dtype: str, with_text: bool = False) -> Features:
    """The columns of a cache of `width` dimensions stored in `dtype`; `with_text` adds the decoded context."""
    features = {
        "activation": List(Value(dtype), length=width),
        "input_ids": List(Value("int32")),
        "position": Value("int32"),
        "document": Value("int64"),
    }
    return Features(features | ({TEXT_COLUMN: Value("string")} if with_text else {}))
