"""Building an activation cache against the bare forward pass of the same tokens through the truncated subject.

The bare side has the same batches of the same tokens ready on the device, runs them through a model cut after block 7,
and does nothing with what comes out; ours is a whole build, from the plan and the hash of the weights to synced shards
and provenance. So the ratio is at most about 1: the share of a build's time that is the subject's own arithmetic. It
should be above 1 / 1.3.
Run with `python tests/benchmarks/cache_vs_bare_forward.py`.
"""

import copy
import tempfile
from pathlib import Path

import torch
from cache_subject import BATCH, LAYER, LENGTH, MIN_POSITION, NUM_LAYERS, make_corpus, make_model, make_tokenizer
from harness import compare, prepare

from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.activation_reading import length_buckets
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.residual_stream import truncated
from consistency_lens.subject import Subject

NUM_SEQUENCES, POSITIONS = 256, 8


def batches_of(cache: ActivationCache, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the subject reads for a cache: each sequence as far as its last position, padded in the same batches."""
    contexts = [torch.tensor(ids) for ids in cache.dataset["input_ids"][POSITIONS - 1 :: POSITIONS]]
    batches = []
    for bucket in length_buckets([len(context) for context in contexts], BATCH):
        input_ids = torch.nn.utils.rnn.pad_sequence([contexts[i] for i in bucket], batch_first=True, padding_value=-1)
        batches.append((input_ids.clamp(min=0).to(device), (input_ids >= 0).long().to(device)))
    return batches


def main() -> None:
    """Times both sides."""
    device = prepare()
    model, tokenizer, corpus = make_model().to(device), make_tokenizer(), make_corpus(NUM_SEQUENCES)
    subject = Subject(model, LAYER)
    cut = truncated(copy.deepcopy(model), LAYER + 1).eval()
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
                batch_size=BATCH,
                progress=False,
            )

        batches = batches_of(build(), device)

        @torch.no_grad()
        def bare() -> None:
            for input_ids, attention_mask in batches:
                cut(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

        compare(
            "cache_vs_bare_forward",
            f"cache of {NUM_SEQUENCES * POSITIONS} activations, K={POSITIONS}, against the bare pass of its tokens "
            f"through {LAYER + 1} of {NUM_LAYERS} blocks, S={LENGTH}",
            build,
            bare,
            device,
            runs=5,
        )


if __name__ == "__main__":
    main()
