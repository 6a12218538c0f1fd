"""One shared copy of the frozen weights against three: peak memory of building a lens and training it for a step.

Both sides hold subject, decoder and encoder, train the projections and prompts alone, and do the same arithmetic; they
differ in whether the clones' frozen tensors are the subject's or copies. Each runs in a process of its own.
Run with `python tests/benchmarks/shared_weights_memory.py`.
"""

import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from harness import prepare, write_result
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from consistency_lens import (
    ConsistencyLensConfig,
    ConsistencyLensModel,
    LensDecoder,
    LensDecoderConfig,
    LensEncoder,
    LensEncoderConfig,
)
from consistency_lens.lens_clone import clone_subject

BATCH, NUM_TEXT_TOKENS, LAYER, NUM_LAYERS, WIDTH, VOCAB_SIZE, RUNS = 4, 8, 9, 12, 768, 16384, 3


def make_subject(device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=12,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device)


def make_lens(subject: PreTrainedModel, share_weights: bool) -> ConsistencyLensModel:
    common = {"base_config": subject.config.to_dict(), "layer": LAYER, "num_text_tokens": NUM_TEXT_TOKENS}
    prompt = {"prefix_ids": [1, 5, 6], "suffix_ids": [7]}
    config = ConsistencyLensConfig(LensDecoderConfig(**common, **prompt), LensEncoderConfig(**common, **prompt))
    decoder = LensDecoder(config.decoder, clone_subject(subject, share_weights))
    decoder.start_projections()
    return ConsistencyLensModel(
        config, decoder, LensEncoder(config.encoder, clone_subject(subject, share_weights)), subject
    )


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(share_weights: bool, device: torch.device) -> None:
    """Writes to standard output by how many bytes the peak rises, and the reconstructions' sum."""
    torch.zeros(1, device=device)
    before = peak_bytes(device)
    lens = make_lens(make_subject(device), share_weights)
    reconstruction = lens(torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0)).to(device))[0]
    reconstruction.square().mean().backward()
    sys.stdout.write(f"{peak_bytes(device) - before} {reconstruction.sum().item():.4f}\n")


def main() -> None:
    """Runs both sides in turn, checks that they computed the same, and writes the medians."""
    device = prepare()
    if len(sys.argv) > 1:
        measure(sys.argv[1] == "shared", device)
        return
    peaks: dict[str, list[int]] = {"shared": [], "copied": []}
    sums = set()
    for _ in range(RUNS):
        for side, values in peaks.items():
            command = [sys.executable, str(Path(__file__).resolve()), side]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            values.append(int(output[-2]))
            sums.add(output[-1])
    if len(sums) != 1:
        raise RuntimeError(f"the two sides computed different reconstructions: {sums}")
    megabytes = sum(p.nbytes for p in make_subject(torch.device("cpu")).parameters()) / 2**20
    write_result(
        "shared_weights_memory",
        f"peak memory of building a frozen lens and one training step, subject of {megabytes:.0f} MiB, B={BATCH} "
        f"T={NUM_TEXT_TOKENS}, encoder cut after block {LAYER} of {NUM_LAYERS}: one copy of the weights against three",
        "bytes",
        statistics.median(peaks["shared"]),
        statistics.median(peaks["copied"]),
        RUNS,
        device,
    )


if __name__ == "__main__":
    main()
