"""A step of a lens with adapters: a layer and its adapter as one node, against PEFT's operations one by one.

Of a deep and narrow model a step is little but starting operations, as it is on a GPU that a batch does not fill; of
a wide one it is mostly arithmetic, which is the same on both sides. Memory is that of the wide one in float32 under
bfloat16 autocast, where ours also rounds frozen weights once a step (`rounded_weights`).
Run with `python tests/benchmarks/adapters_at_once.py`; it writes `adapters_at_once`, `adapters_at_once_wide` and
`rounded_weights_memory`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_shapes import Shape
from harness import compare, prepare, write_result
from step_on_paper import make_batch, our_terms
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from live_bytes import peak_bytes  # noqa: E402

from consistency_lens.adapters import adapters_at_once  # noqa: E402
from consistency_lens.rounded_weights import weights_rounded_once  # noqa: E402

RUNS, NUM_TEXT_TOKENS, VOCAB_SIZE = 7, 16, 512
# (suffix, blocks, width, activations of a step)
MODELS = (("", 32, 64, 8), ("_wide", 6, 512, 64))


def make_shape(num_layers: int, width: int, batch: int) -> Shape:
    """A Llama and how many activations a step has."""
    sizes = {
        "vocab_size": VOCAB_SIZE, "hidden_size": width, "intermediate_size": 3 * width,
        "num_hidden_layers": num_layers, "num_attention_heads": width // 16, "num_key_value_heads": width // 16,
    }  # fmt: skip
    return Shape("", sizes, batch, cache_sequences=0, num_text_tokens=NUM_TEXT_TOKENS)


@contextmanager
def as_in_training(lens: nn.Module) -> Iterator[None]:
    """What the trainer puts around a step."""
    with adapters_at_once(lens), weights_rounded_once(lens):
        yield


def make_steps(shape: Shape, device: torch.device) -> dict[str, Callable[[], Any]]:
    """A step of each side that gives its gradients, one of each under autocast, and the bytes that these take."""
    lens = shape.make_lens(device).float()
    rows = make_batch(shape, lens)
    rows = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in rows.items()}

    def step(around: Callable[[nn.Module], AbstractContextManager], autocast: bool = False) -> torch.Tensor:
        lens.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            terms = our_terms(lens, rows, around=around)
        (terms["kl"] + terms["lm"]).backward()
        return torch.cat([p.grad.flatten() for p in lens.parameters() if p.grad is not None])

    def peak(around: Callable[[nn.Module], AbstractContextManager]) -> int:
        return peak_bytes(lambda: step(around, autocast=True), nn.ModuleList([lens, lens.subject.model]))

    ways = {"ours": as_in_training, "theirs": lambda _lens: nullcontext()}
    steps = {name: partial(step, way) for name, way in ways.items()}
    return steps | {f"bytes of {name}": partial(peak, way) for name, way in ways.items()}


def main() -> None:
    """Checks that both sides have the same gradients, and measures them."""
    device = prepare()
    for suffix, num_layers, width, batch in MODELS:
        shape = make_shape(num_layers, width, batch)
        sides = make_steps(shape, device)
        torch.testing.assert_close(sides["ours"](), sides["theirs"](), rtol=1e-3, atol=1e-5)
        what = (
            f"adapters on all layers, B={batch} S={shape.length} T={shape.num_text_tokens} K=8, {num_layers} blocks "
            f"of width {width}: a layer and its adapter as one node against PEFT's operations"
        )
        name = f"adapters_at_once{suffix}"
        compare(name, f"training step, {what}", sides["ours"], sides["theirs"], device, RUNS)
        if suffix and device.type == "cpu":
            peaks = [sides[f"bytes of {side}"]() for side in ("ours", "theirs")]
            what = (
                f"peak memory beside weights of a training step under bfloat16 autocast, {what.partition(':')[0]}: "
                "frozen float32 weights rounded once a step against once for each use"
            )
            write_result("rounded_weights_memory", what, "bytes", *peaks, 1, device)


if __name__ == "__main__":
    main()
