"""What all tests share: no network, and the pretrained model that some tests read."""

import os
from pathlib import Path

# Before anything imports huggingface_hub, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

STORIES260K = Path(__file__).parents[2] / "shared" / "data" / "stories260K"


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """The folder of a small pretrained story model, made by others; it is not part of the repository."""
    if not STORIES260K.is_dir():
        pytest.skip("no pretrained model at ../shared/data/stories260K")
    return STORIES260K
