"""Whether a model reads from left to right, as all that is done with a subject takes for granted."""

import math

import torch
from transformers import PreTrainedModel

from .residual_stream import headless, token_device

# Two random sequences that begin alike, with tokens enough for every kind of attention to differ behind.
SHARED_LENGTH, LENGTH = 6, 16


@torch.no_grad()
def check_causal(model: PreTrainedModel, name: str) -> None:
    """Checks that no token of a model sees those behind it, by two random sequences that begin alike.

    `AutoModelForCausalLM` takes BERT and its kin too, and says no more than a warning. The context of a position would
    change there with the residual that is replaced, and an activation would tell of tokens that it is to predict.

    Args:
        model: in evaluation mode.
        name: what the error calls it.

    Raises:
        ValueError: if the first tokens' last residuals differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(model.config.get_text_config().vocab_size, (2, LENGTH), generator=generator)
    rows[1, :SHARED_LENGTH] = rows[0, :SHARED_LENGTH]
    states = headless(model)(input_ids=rows.to(token_device(model)), use_cache=False)[0][:, :SHARED_LENGTH].float()
    difference = (states[1] - states[0]).norm() / states[0].norm()
    if difference > math.sqrt(torch.finfo(model.dtype).eps):
        raise ValueError(
            f"model: the tokens of {name!r} ({type(model).__name__}) see those behind them, got first tokens that "
            f"differ by {difference:.0%} where later ones do; pass a causal LM"
        )
