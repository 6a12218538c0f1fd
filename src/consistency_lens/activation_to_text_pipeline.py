"""The pipeline `activation-to-text`: texts or activations in, the lens's words for each activation out."""

import os
from dataclasses import asdict
from typing import Any

import torch
from huggingface_hub import CommitInfo
from transformers import Pipeline

from .modeling_consistency_lens import ConsistencyLensModel


class ActivationToTextPipeline(Pipeline):
    """Reads activations in words, by `pipeline("activation-to-text", model=<a lens>)`.

    A text gives a list with a dictionary for each of its tokens: `position, token, text, fve, kl, top_before` and
    `top_after`, see `TokenExplanation`. An activation (d,), or activations (N, d), give one for each: `text, fve`;
    what the subject then predicts is not known, as its context is not. A list of inputs gives a list of such lists.

    Args of a call:
        positions: of a text, the indices of the tokens to read; all by default.

    Raises:
        ValueError: for a model that is no whole lens, an empty text, or an activation of another width.
    """

    task_name = "activation-to-text"
    # nothing is loaded beside the lens, which brings its own tokenizer
    _load_tokenizer: Any = False
    _load_processor: Any = False
    _load_feature_extractor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    model: Any

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        if not isinstance(model, ConsistencyLensModel):
            raise ValueError(f"pipeline: {self.task_name} needs a ConsistencyLensModel, got {type(model).__name__}")
        super().__init__(model, *args, **kwargs)

    def _sanitize_parameters(self, positions: list[int] | None = None, **unknown: Any) -> tuple[dict, dict, dict]:
        for name in unknown:
            raise TypeError(f"pipeline: {self.task_name} has no argument {name!r}")
        return {}, {} if positions is None else {"positions": positions}, {}

    def preprocess(self, input_: Any, **parameters: Any) -> dict[str, Any]:
        """A text stays one: the lens tokenizes it, for it knows where the text begins."""
        return {"input": input_}

    def _forward(self, input_tensors: dict[str, Any], **parameters: Any) -> Any:
        given, lens = input_tensors["input"], self.model
        if isinstance(given, str):
            return {"rows": [asdict(token) for token in lens.explain(given, **parameters)]}
        if parameters:
            raise ValueError("pipeline: positions are of a text, but got activations; leave positions out")
        activations = torch.atleast_2d(torch.as_tensor(given)).to(lens.device).float()
        texts = lens.decode(activations)
        error = (activations - lens.encode(texts.token_ids)).square().sum(-1)
        fve = 1 - error / (activations - lens.mean).square().sum(-1)
        rows = zip(texts.texts, fve.tolist(), strict=True)
        return {"rows": [{"text": text, "fve": value} for text, value in rows]}

    def postprocess(self, model_outputs: dict[str, Any], **parameters: Any) -> list[dict[str, Any]]:
        return model_outputs["rows"]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the lens, which is all that there is."""
        self.model.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Pushes the lens."""
        return self.model.push_to_hub(repo_id, **kwargs)
