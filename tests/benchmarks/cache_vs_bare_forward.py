"""Building an activation cache against the bare forward pass of the same tokens through the truncated subject.

The bare side has the same batches of the same tokens ready on the device, runs them through a model cut after the
block that is read, and does nothing with what comes out; ours is a whole build, from the plan and the hash of the
weights to synced shards and provenance. So the ratio is at most about 1: the share of a build's time that is the
subject's own arithmetic. It should be above 1 / 1.3, and on a GPU above 0.6, where the hash of large weights, which
does not grow with the cache, takes a part that is named.
Run with `python tests/benchmarks/cache_vs_bare_forward.py`: on a CPU a small model, on a GPU the shapes of
`gpu_shapes`, or `--shapes` of them; there `--results FOLDER` says where results and page go.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from cache_subject import BATCH, LAYER, LENGTH, MIN_POSITION, NUM_LAYERS, make_corpus, make_model, make_tokenizer
from gpu_page import write_page
from gpu_shapes import MIN_POSITION as MIN_POSITION_ON_GPU
from gpu_shapes import SHAPES, Shape, word_tokenizer
from harness import PAGE, RESULTS, interleaved, prepare, seconds, write_result
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.activation_reading import length_buckets
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.fingerprints import weights_hash
from consistency_lens.residual_stream import truncated
from consistency_lens.subject import Subject

NUM_SEQUENCES, POSITIONS = 256, 8
GPU_BATCH = 64  # sequences of a pass
ROWS_PER_SHARD = 8192  # whose sequences a build batches by themselves


def batches_of(
    cache: ActivationCache, positions: int, batch: int, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the subject reads for a cache: each sequence as far as its last position, padded in the same batches."""
    contexts = [torch.tensor(ids) for ids in cache.dataset["input_ids"][positions - 1 :: positions]]
    batches = []
    for first in range(0, len(contexts), ROWS_PER_SHARD // positions):
        of_shard = contexts[first : first + ROWS_PER_SHARD // positions]
        for bucket in length_buckets([len(context) for context in of_shard], batch):
            rows = [of_shard[i] for i in bucket]
            input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
            batches.append((input_ids.clamp(min=0).to(device), (input_ids >= 0).long().to(device)))
    return batches


def measure(
    model: PreTrainedModel,
    layer: int,
    corpus: Any,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    batch: int,
    positions: int,
    min_position: int,
    runs: int,
) -> dict[str, float]:
    """Median seconds of `ours` and `theirs`, after a build and a pass over one batch."""
    subject = Subject(model, layer)
    cut = truncated(copy.deepcopy(model), layer + 1).eval()
    with tempfile.TemporaryDirectory() as folder:
        calls = iter(range(1000))

        def build() -> ActivationCache:
            return build_activation_cache(
                subject,
                corpus,
                Path(folder) / str(next(calls)),
                tokenizer=tokenizer,
                subject_name="benchmark",
                dataset_name="random",
                positions_per_sequence=positions,
                min_position=min_position,
                batch_size=batch,
                rows_per_shard=ROWS_PER_SHARD,
                progress=False,
            )

        batches = batches_of(build(), positions, batch, device)

        @torch.no_grad()
        def bare(over: slice = slice(None)) -> None:
            for input_ids, attention_mask in batches[over]:
                cut(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

        bare(slice(1))
        return interleaved({"ours": build, "theirs": bare}, device, runs, warmup=0)


def measure_shape(shape: Shape, device: torch.device, results: Path, page: Path) -> None:
    """Writes the result of a shape, and the page of all that was measured on GPUs."""
    model, corpus = shape.make_subject(device), shape.make_corpus(shape.cache_sequences)
    medians = measure(
        model, shape.layer, corpus, word_tokenizer(), device,
        batch=GPU_BATCH, positions=shape.positions, min_position=MIN_POSITION_ON_GPU, runs=2,
    )  # fmt: skip
    hashing = seconds(lambda: weights_hash(model), device)
    what = (
        f"cache of {shape.cache_sequences * shape.positions:,} activations, {shape.name} shape, K={shape.positions}, "
        f"against the bare pass of its tokens through {shape.layer + 1} of {shape.sizes['num_hidden_layers']} blocks, "
        f"S={shape.length}; {hashing:.3g} seconds of a build are the hash of the weights"
    )
    name = f"cache_vs_bare_forward_{shape.name}"
    result = write_result(name, what, "seconds", medians["ours"], medians["theirs"], 2, device, results)
    write_page(results, page, result)


def main() -> None:
    """Times both sides."""
    device = prepare()
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--results", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if device.type == "cuda":
        for name in options.shapes:
            if options.results is None:
                measure_shape(SHAPES[name], device, RESULTS / "gpu", PAGE)
            else:
                measure_shape(SHAPES[name], device, options.results / "results", options.results / "gpu.md")
        return
    medians = measure(
        make_model(), LAYER, make_corpus(NUM_SEQUENCES), make_tokenizer(), device,
        batch=BATCH, positions=POSITIONS, min_position=MIN_POSITION, runs=5,
    )  # fmt: skip
    what = (
        f"cache of {NUM_SEQUENCES * POSITIONS} activations, K={POSITIONS}, against the bare pass of its tokens "
        f"through {LAYER + 1} of {NUM_LAYERS} blocks, S={LENGTH}"
    )
    write_result("cache_vs_bare_forward", what, "seconds", medians["ours"], medians["theirs"], 5, device)


if __name__ == "__main__":
    main()
