"""What the Hub asks of the head of a card, as far as its docs say (hub/model-cards, hub/datasets-cards)."""

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from consistency_lens.hub.cache_card import SIZE_NAMES
from consistency_lens.hub.card_metadata import LANGUAGE_PATTERN, LICENSES

RELATIONS = {"adapter", "merge", "quantized", "finetune"}
# https://github.com/huggingface/huggingface.js, packages/tasks/src/pipelines.ts
PIPELINE_TAGS = set(
    """
    text-classification token-classification table-question-answering question-answering zero-shot-classification
    translation summarization feature-extraction text-generation fill-mask sentence-similarity text-to-speech
    text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
    voice-activity-detection depth-estimation image-classification object-detection image-segmentation text-to-image
    image-to-text image-to-image image-to-video unconditional-image-generation video-classification
    reinforcement-learning robotics tabular-classification tabular-regression tabular-to-text table-to-text
    multiple-choice text-ranking text-retrieval time-series-forecasting text-to-video image-text-to-text
    visual-question-answering document-question-answering zero-shot-image-classification graph-ml mask-generation
    zero-shot-object-detection text-to-3d image-to-3d image-feature-extraction video-text-to-text keypoint-detection
    visual-document-retrieval any-to-any video-to-video other
    """.split()
)


def check_model_card(path: Path) -> dict[str, Any]:
    """Checks the head of a model's card, and that `huggingface_hub` reads from it what is in it.

    Returns:
        The head.
    """
    head = metadata_load(path)
    card = ModelCard.load(path)
    assert card.data.to_dict() == head, "reading and writing the head changes it"
    check_shared(head)
    assert head.get("pipeline_tag") is None or head["pipeline_tag"] in PIPELINE_TAGS
    for name in as_list(head.get("base_model")):
        validate_repo_id(name)
        assert "/" in name and not Path(name).exists(), f"{name} is no repository's id"
    assert ("base_model_relation" in head) <= ("base_model" in head)
    assert head.get("base_model_relation", "adapter") in RELATIONS
    for name in as_list(head.get("datasets")):
        validate_repo_id(name)
    if "model-index" in head:
        name, results = model_index_to_eval_results(head["model-index"])
        assert name and results
        for result in results:
            assert result.metric_type and result.task_type in PIPELINE_TAGS and result.dataset_name
            assert isinstance(result.metric_value, int | float) and math.isfinite(result.metric_value)
        assert eval_results_to_model_index(name, results) == head["model-index"]
    if "co2_eq_emissions" in head:
        assert head["co2_eq_emissions"]["emissions"] >= 0
    return head


def check_dataset_card(path: Path) -> dict[str, Any]:
    """The same for the card of a data set."""
    head = metadata_load(path)
    assert DatasetCard.load(path).data.to_dict() == head
    check_shared(head)
    assert set(as_list(head.get("size_categories"))) <= set(SIZE_NAMES)
    return head


def check_shared(head: dict[str, Any]) -> None:
    """What cards of models and of data sets have in common."""
    assert None not in head.values() and "" not in head.values()
    assert set(as_list(head.get("license"))) <= LICENSES
    if head.get("license") != "other":
        assert "license_name" not in head
    assert all(isinstance(tag, str) and tag for tag in head["tags"])
    assert len(set(head["tags"])) == len(head["tags"])
    assert all(re.fullmatch(LANGUAGE_PATTERN, name) for name in as_list(head.get("language")))


def as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
