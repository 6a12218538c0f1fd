"""Gradient checkpointing of a soft generation of 16 tokens: the peak of memory, and what it costs in time.

Ours checkpoints the pass of each token, over the keys and values of those before. The time is also set against blocks
that are checkpointed as transformers does it: that takes their cache away, so each token runs the whole sequence.
Run with `python tests/benchmarks/checkpointing.py`; it writes `checkpointing_memory` and `checkpointing_time` against
no checkpointing, and `checkpointing_against_whole_sequences`.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import compare, prepare, write_result
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from live_bytes import peak_bytes  # noqa: E402
from tiny_lenses import keys, tiny_tokenizer  # noqa: E402

from consistency_lens import ConsistencyLensModel  # noqa: E402

BATCH, NUM_TEXT_TOKENS, LAYER, NUM_LAYERS, WIDTH, VOCAB_SIZE, RUNS = 16, 16, 3, 6, 256, 97, 7
SIZES = f"B={BATCH} T={NUM_TEXT_TOKENS}, {NUM_LAYERS} blocks of width {WIDTH}, LoRA"


def make_lens(device: torch.device, checkpointed: bool) -> ConsistencyLensModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    lens = ConsistencyLensModel.from_subject(
        LlamaForCausalLM(config).to(device),
        tiny_tokenizer(),
        LAYER,
        num_text_tokens=NUM_TEXT_TOKENS,
        training="lora",
        lora={"r": 8, "target_modules": "all-linear"},
        decoder_prompt="w3 w4 w5 w6 <embed> w7 w8",
    )
    if checkpointed:
        lens.activation_checkpointing_enable()
    return lens.train()


def step(lens: ConsistencyLensModel, activations: torch.Tensor, use_cache: bool = True) -> torch.Tensor:
    """A generation, a reconstruction, and the gradients of its square."""
    noise = keys(BATCH)
    text = lens.decoder.generate_soft(activations, noise, NUM_TEXT_TOKENS, use_cache=use_cache)
    loss = lens.encoder(lens.encoder.embed_text(text, noise, 1.0)).square().mean()
    lens.zero_grad()
    loss.backward()
    return loss.detach()


def peak(work: Callable[[], torch.Tensor], lens: ConsistencyLensModel, device: torch.device) -> int:
    """Bytes at the peak, beside the lens and its subject."""
    work()
    if device.type != "cuda":
        return peak_bytes(work, lens)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def main() -> None:
    """Checks that all sides compute the same, and measures them."""
    device = prepare()
    activations = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
    plain, checkpointed = make_lens(device, False), make_lens(device, True)
    sides = {
        "plain": lambda: step(plain, activations),
        "ours": lambda: step(checkpointed, activations),
        "whole": lambda: step(checkpointed, activations, use_cache=False),
    }
    torch.testing.assert_close(sides["ours"](), sides["plain"]())
    torch.testing.assert_close(sides["whole"](), sides["plain"]())
    peaks = {name: peak(work, plain if name == "plain" else checkpointed, device) for name, work in sides.items()}
    what = f"a step of soft generation and reconstruction, {SIZES}"
    write_result(
        "checkpointing_memory",
        f"peak memory beside the weights of {what}: checkpointed against not; whole sequences in checkpointed blocks "
        f"take {peaks['whole']} bytes",
        "bytes",
        peaks["ours"],
        peaks["plain"],
        1,
        device,
    )
    compare("checkpointing_time", f"{what}: checkpointed against not", sides["ours"], sides["plain"], device, RUNS)
    compare(
        "checkpointing_against_whole_sequences",
        f"{what}: checkpointed pass by pass against whole sequences in checkpointed blocks",
        sides["ours"],
        sides["whole"],
        device,
        RUNS,
    )


if __name__ == "__main__":
    main()
