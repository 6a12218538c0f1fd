"""Named parts of a training step, for a profile of it (`training.profiling`)."""

from torch.profiler import record_function

PREFIX = "lens: "


def span(part: str) -> record_function:
    """A `with` block that a running torch profiler records under the part's name; next to nothing where none runs."""
    return record_function(PREFIX + part)
