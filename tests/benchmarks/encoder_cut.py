"""The encoder cut after block k against the whole base model read at `hidden_states[k + 1]`, forward and backward.

Neither side has a head, and autograd skips the blocks above k on both.
Run with `python tests/benchmarks/encoder_cut.py`.
"""

import copy

import torch
from harness import compare, prepare
from transformers import LlamaConfig, LlamaForCausalLM

from consistency_lens.residual_stream import truncated

BATCH, LENGTH, LAYER, NUM_LAYERS, WIDTH, VOCAB_SIZE = 16, 24, 3, 8, 256, 8192


def main() -> None:
    """Times both sides, after checking that they agree."""
    device = prepare()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    whole = LlamaForCausalLM(config).to(device)
    cut = truncated(copy.deepcopy(whole), LAYER + 1)
    input_ids = torch.randint(VOCAB_SIZE, (BATCH, LENGTH), device=device)

    def encode_cut() -> torch.Tensor:
        return cut(input_ids, use_cache=False).last_hidden_state[:, -1]

    def encode_whole() -> torch.Tensor:
        output = whole.model(input_ids, use_cache=False, output_hidden_states=True)
        return output.hidden_states[LAYER + 1][:, -1]

    torch.testing.assert_close(encode_cut(), encode_whole())
    compare(
        "encoder_cut",
        f"encoder cut after block {LAYER} of {NUM_LAYERS} against the whole base model, B={BATCH} S={LENGTH}",
        lambda: encode_cut().square().sum().backward(),
        lambda: encode_whole().square().sum().backward(),
        device,
    )


if __name__ == "__main__":
    main()
