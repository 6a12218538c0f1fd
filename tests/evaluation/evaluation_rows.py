"""A tiny lens that is not an untrained one, and rows for it, without a cache on disk; for the tests of evaluation."""

import torch
from tiny_models import VOCAB_SIZE, random_tokens, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from consistency_lens.data.collator import ActivationCollator
from consistency_lens.modeling_consistency_lens import ConsistencyLensModel
from consistency_lens.subject import Subject

BOS, LAYER, NUM_TEXT_TOKENS = 1, 1, 4
ROWS_PER_DOCUMENT = 2


def word_tokenizer(bos_token: str | None = "<s>") -> PreTrainedTokenizerFast:
    """Whole words `w3 w4 ...`, with pad 0, BOS 1 and EOS 2 as in the tiny models."""
    vocabulary = {"<pad>": 0, "<s>": BOS, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos_token, eos_token="</s>", pad_token="<pad>", unk_token="w3"
    )


def tiny_rows(subject: Subject, *lengths: int) -> list[dict]:
    """One row for a context of each length, BOS included; two rows in a row are of one document."""
    input_ids, attention_mask = random_tokens(*lengths)
    input_ids[:, 0] = BOS
    activations = subject.activations(input_ids, attention_mask)
    return [
        {
            "activation": activations[row, length - 1].numpy(),
            "input_ids": input_ids[row, :length].tolist(),
            "position": length - 1,
            "document": 100 + row // ROWS_PER_DOCUMENT,
            "row": 1000 + row,
        }
        for row, length in enumerate(lengths)
    ]


def tiny_lens(
    family: str = "llama", tokenizer: PreTrainedTokenizerFast | None = None, **settings
) -> ConsistencyLensModel:
    """A lens whose projections were moved at random; its statistics are made up, so that the mean is a bad guess."""
    settings = {"num_text_tokens": NUM_TEXT_TOKENS} | settings
    lens = ConsistencyLensModel.from_subject(tiny_model(family), tokenizer or word_tokenizer(), LAYER, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (lens.decoder.projection, lens.encoder.output_map):
            layer.weight.add_(0.2 * torch.randn(layer.weight.shape, generator=generator))
    lens.set_statistics(0.3 * torch.randn(lens.mean.shape, generator=generator), 1.5)
    return lens.eval()


def tiny_collator() -> ActivationCollator:
    return ActivationCollator(pad_token_id=0, num_text_tokens=NUM_TEXT_TOKENS, bos_token_id=BOS)
