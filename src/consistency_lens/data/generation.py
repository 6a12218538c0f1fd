"""A corpus written by the model itself: documents sampled from any causal LM, in batches, with a KV cache.

Document n of a seed is a pure function of the model, the seed and n: its random numbers are its own, so the batch it
happens to be sampled in does not matter (but for ties within the rounding of the model's matrix products).
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cached_passes import keeps_keys_and_values
from ..context_length import context_length
from .corpus import corpus_from_rows, document_hash

logger = logging.getLogger(__name__)

COMPACT_EVERY = 16  # steps between looks for finished rows: a look waits for the device and may copy the cache


def sample_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_documents: int,
    max_length: int,
    *,
    batch_size: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    prompt_ids: Sequence[int] | None = None,
    progress: bool = True,
) -> Dataset:
    """Samples `num_documents` different documents of at most `max_length` tokens, start and EOS included.

    A document starts at `prompt_ids` (default: BOS, or EOS for a tokenizer without BOS), which it keeps, and ends with
    the first EOS, or where `max_length` cuts it. Equal documents are kept once; when twice `num_documents` draws did
    not give enough different ones, fewer are returned and a warning says how many. Temperature 0 is greedy: it has
    one document to give.

    Args:
        batch_size: documents sampled side by side.
        top_k: draw among the k most probable tokens only; None for the whole vocabulary.

    Returns:
        A corpus (see `data.corpus`): `input_ids` and `document`, here the hash of the tokens, in the order of drawing.

    Raises:
        ValueError: for counts below 1, a negative temperature, a length the model cannot hold, a tokenizer with
            neither BOS nor EOS where no prompt is given, or a model without a KV cache.
    """
    prompt = _prompt(tokenizer, prompt_ids)
    _check(model, num_documents, max_length, len(prompt), batch_size, temperature, top_k)
    max_draws = 1 if temperature == 0 else 2 * num_documents
    documents: dict[int, list[int]] = {}
    drawn = 0
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=num_documents, desc="sampling", unit="document", disable=not progress) as bar:
            while len(documents) < num_documents and drawn < max_draws:
                count = min(batch_size, num_documents - len(documents), max_draws - drawn)
                uniforms = _uniforms(seed, range(drawn, drawn + count), max_length)
                for tokens in _sample_batch(model, prompt, uniforms, tokenizer.eos_token_id, temperature, top_k):
                    documents.setdefault(document_hash(tokens), tokens)
                drawn += count
                bar.update(len(documents) - bar.n)
    finally:
        model.train(was_training)
    if len(documents) < num_documents:
        logger.warning("only %d different documents of %d in %d draws", len(documents), num_documents, drawn)
    return corpus_from_rows({"input_ids": ids, "document": document} for document, ids in documents.items())


def _prompt(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] | None) -> list[int]:
    if prompt_ids is not None:
        prompt = list(prompt_ids)
    else:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        prompt = [] if start is None else [start]
    if not prompt:
        raise ValueError("generation: no token to start from (no BOS, EOS or prompt); pass prompt_ids=[...]")
    return prompt


def _check(
    model: PreTrainedModel,
    num_documents: int,
    max_length: int,
    prompt_length: int,
    batch_size: int,
    temperature: float,
    top_k: int | None,
) -> None:
    for name, value in (("num_documents", num_documents), ("batch_size", batch_size), ("top_k", top_k)):
        if value is not None and value < 1:
            raise ValueError(f"generation: {name} must be at least 1, got {value}")
    if temperature < 0:
        raise ValueError(f"generation: temperature must be 0 (greedy) or above, got {temperature}")
    if max_length <= prompt_length:
        raise ValueError(
            f"generation: max_length={max_length} leaves no room after a prompt of {prompt_length} tokens"
        )
    context = context_length(model.config)
    if context is not None and max_length > context:
        raise ValueError(f"generation: max_length={max_length} is beyond the model's context of {context}; lower it")


def _uniforms(seed: int, draws: Sequence[int], max_length: int) -> torch.Tensor:
    """A uniform number in [0, 1) for every token of the given draws, (B, S); a row depends on seed and draw only."""
    # 23 bits: then u * total rounds to less than total in float32, and no token of probability zero is ever drawn.
    bits = np.stack([np.random.default_rng([seed, draw]).integers(0, 2**23, max_length) for draw in draws])
    return torch.from_numpy((bits / 2**23).astype(np.float32))


@torch.no_grad()
def _sample_batch(
    model: PreTrainedModel,
    prompt: list[int],
    uniforms: torch.Tensor,
    eos_token_id: int | None,
    temperature: float,
    top_k: int | None,
) -> list[list[int]]:
    """Samples one document for each row of `uniforms` (B, S); rows that met EOS leave the batch and its cache."""
    uniforms = uniforms.to(model.device)
    batch_size, max_length = uniforms.shape
    tokens = torch.zeros(batch_size, max_length, dtype=torch.long, device=model.device)
    tokens[:, : len(prompt)] = torch.tensor(prompt, device=model.device)
    running = torch.arange(batch_size, device=model.device)
    step_ids, cache = tokens[:, : len(prompt)], None
    cached = keeps_keys_and_values(model)  # a state (Mamba, LFM2) could not be left by rows that met EOS
    for length in range(len(prompt), max_length):
        output = model(input_ids=step_ids, use_cache=cached, **({"past_key_values": cache} if cached else {}))
        cache = output.get("past_key_values")
        if cached and cache is None:
            raise ValueError(f"generation: {type(model).__name__} returned no KV cache; pass a model with use_cache")
        next_ids = _draw_tokens(output.logits[:, -1].float(), uniforms[running, length], temperature, top_k)
        tokens[running, length] = next_ids
        step_ids = next_ids[:, None] if cached else tokens[running, : length + 1]
        if eos_token_id is not None and (length - len(prompt) + 1) % COMPACT_EVERY == 0:
            unfinished = (tokens[running, len(prompt) : length + 1] != eos_token_id).all(dim=1)
            remaining = unfinished.nonzero()[:, 0]
            if len(remaining) == 0:
                break
            if len(remaining) < len(running):
                if cached:
                    cache.batch_select_indices(remaining)
                running, step_ids = running[remaining], step_ids[remaining]
    return [_cut(row, len(prompt), eos_token_id) for row in tokens.tolist()]


def _draw_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_k: int | None) -> torch.Tensor:
    """Token ids (N,) drawn from `logits` (N, V) by the inverse of the cumulative distribution at `uniforms` (N,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    cumulative = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]


def _cut(tokens: list[int], prompt_length: int, eos_token_id: int | None) -> list[int]:
    """The tokens up to the first EOS after the prompt, which is kept."""
    if eos_token_id in tokens[prompt_length:]:
        return tokens[: tokens.index(eos_token_id, prompt_length) + 1]
    return tokens
