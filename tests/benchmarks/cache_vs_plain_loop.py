"""Building an activation cache against a plain loop: `output_hidden_states=True` and one position a sequence.

Both sides make the same number of float32 activations of block 7 of 12, by the same model, in passes of as many
tokens, and leave them on disk. The loop runs the whole model, as such loops do, and saves one array. Ours is a whole
build, from the plan and the hash of the weights to synced shards and provenance; it ends after block 7 and takes K
positions of a sequence, so it reads K times fewer sequences. That is where most of the ratio comes from, and it has a
price: K rows of one document are less varied than rows of K documents. So the ratio at K=1 is measured too, where both
sides have the same sequences, and ours reads each as far as its position.
Run with `python tests/benchmarks/cache_vs_plain_loop.py`.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cache_subject import BATCH, LAYER, LENGTH, MIN_POSITION, NUM_LAYERS, make_corpus, make_model, make_tokenizer
from datasets import Dataset
from harness import compare, prepare
from transformers import PreTrainedModel

from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.data.cache_plan import draw_positions
from consistency_lens.subject import Subject

NUM_ACTIVATIONS, POSITIONS = 256, 8


@torch.no_grad()
def plain_loop(model: PreTrainedModel, corpus: Dataset, file: Path) -> np.ndarray:
    """The activation at one position of each sequence, (N, d), also saved."""
    activations = []
    for start in range(0, len(corpus), BATCH):
        rows = corpus[start : start + BATCH]
        input_ids = torch.tensor(rows["input_ids"], device=model.device)
        output = model(input_ids=input_ids, output_hidden_states=True)
        positions = [
            draw_positions(LENGTH, document, start + index, 1, MIN_POSITION, 0)[0]
            for index, document in enumerate(rows["document"])
        ]
        hidden = output.hidden_states[LAYER + 1][torch.arange(len(positions)), torch.tensor(positions)]
        activations.append(hidden.float().cpu().numpy())
    stacked = np.concatenate(activations)
    np.save(file, stacked)
    return stacked


def main() -> None:
    """Times both sides, after checking that they agree where they read the same positions."""
    device = prepare()
    model, tokenizer = make_model().to(device), make_tokenizer()
    subject = Subject(model, LAYER)
    corpora = {k: make_corpus(NUM_ACTIVATIONS // k) for k in (1, POSITIONS)}
    with tempfile.TemporaryDirectory() as folder:
        calls = iter(range(1000))

        def build(positions: int) -> np.ndarray:
            cache = build_activation_cache(
                subject,
                corpora[positions],
                Path(folder) / str(next(calls)),
                tokenizer=tokenizer,
                subject_name="benchmark",
                dataset_name="random",
                positions_per_sequence=positions,
                min_position=MIN_POSITION,
                dtype="float32",
                batch_size=BATCH,
                progress=False,
            )
            return cache.activations(np.arange(len(cache)))

        def loop() -> np.ndarray:
            return plain_loop(model, corpora[1], Path(folder) / "loop.npy")

        np.testing.assert_allclose(build(1), loop(), rtol=1e-3, atol=1e-4)
        for positions in (1, POSITIONS):
            name = "cache_vs_plain_loop" if positions == POSITIONS else "cache_vs_plain_loop_k1"
            compare(
                name,
                f"{NUM_ACTIVATIONS} activations of block {LAYER} of {NUM_LAYERS}, S={LENGTH}, on disk: a cache of "
                f"K={positions} against a loop over whole hidden states with one position a sequence",
                partial(build, positions),
                loop,
                device,
                runs=3,
            )


if __name__ == "__main__":
    main()
