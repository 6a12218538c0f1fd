"""Building an activation cache against the bare forward pass of the same tokens through the truncated subject.

The bare side has the same batches of the same tokens ready on the device, runs them through a model cut after the
block that is read, and does nothing with what comes out; ours is a whole build, from the plan and the hash of the
weights to synced shards and provenance. So the ratio is at most about 1: the share of a build's time that is the
subject's own arithmetic. It should be above 1 / 1.3, and on a GPU above 0.6.
Run with `python tests/benchmarks/cache_vs_bare_forward.py`: on a CPU a small model, on a GPU the shapes of
`gpu_shapes`, or those of them that are named.
"""

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from cache_subject import BATCH, LAYER, LENGTH, MIN_POSITION, NUM_LAYERS, make_corpus, make_model, make_tokenizer
from gpu_page import write_page
from gpu_shapes import SHAPES, Shape, word_tokenizer
from harness import PAGE, RESULTS, interleaved, prepare, write_result
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.activation_reading import length_buckets
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.residual_stream import truncated
from consistency_lens.subject import Subject

NUM_SEQUENCES, POSITIONS = 256, 8
GPU_BATCH = 64  # sequences of a pass


def batches_of(cache: ActivationCache, batch: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the subject reads for a cache: each sequence as far as its last position, padded in the same batches."""
    contexts = [torch.tensor(ids) for ids in cache.dataset["input_ids"][POSITIONS - 1 :: POSITIONS]]
    batches = []
    for bucket in length_buckets([len(context) for context in contexts], batch):
        input_ids = torch.nn.utils.rnn.pad_sequence([contexts[i] for i in bucket], batch_first=True, padding_value=-1)
        batches.append((input_ids.clamp(min=0).to(device), (input_ids >= 0).long().to(device)))
    return batches


def measure(
    model: PreTrainedModel,
    layer: int,
    corpus: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    device: torch.device,
    runs: int,
) -> dict[str, float]:
    """Median seconds of `ours` and `theirs`; two or more runs after one other."""
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
                positions_per_sequence=POSITIONS,
                min_position=MIN_POSITION,
                batch_size=batch,
                progress=False,
            )

        batches = batches_of(build(), batch, device)

        @torch.no_grad()
        def bare() -> None:
            for input_ids, attention_mask in batches:
                cut(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

        return interleaved({"ours": build, "theirs": bare}, device, runs, warmup=1)


def measure_shape(shape: Shape, device: torch.device) -> None:
    """Writes the result of a shape, and the page of all that was measured on GPUs."""
    corpus = shape.make_corpus(shape.cache_sequences)
    medians = measure(shape.make_subject(device), shape.layer, corpus, word_tokenizer(), GPU_BATCH, device, runs=2)
    what = (
        f"cache of {shape.cache_sequences * POSITIONS:,} activations, {shape.name} shape, K={POSITIONS}, against the "
        f"bare pass of its tokens through {shape.layer + 1} of {shape.sizes['num_hidden_layers']} blocks, "
        f"S={shape.length}"
    )
    name = f"cache_vs_bare_forward_{shape.name}"
    result = write_result(name, what, "seconds", medians["ours"], medians["theirs"], 2, device)
    write_page(RESULTS / "gpu", PAGE, result)


def main() -> None:
    """Times both sides."""
    device = prepare()
    if device.type == "cuda":
        for name in sys.argv[1:] or SHAPES:
            measure_shape(SHAPES[name], device)
        return
    medians = measure(make_model(), LAYER, make_corpus(NUM_SEQUENCES), make_tokenizer(), BATCH, device, runs=5)
    what = (
        f"cache of {NUM_SEQUENCES * POSITIONS} activations, K={POSITIONS}, against the bare pass of its tokens "
        f"through {LAYER + 1} of {NUM_LAYERS} blocks, S={LENGTH}"
    )
    write_result("cache_vs_bare_forward", what, "seconds", medians["ours"], medians["theirs"], 5, device)


if __name__ == "__main__":
    main()
