"""What a step of a large lens would take, without the machine that it needs: bytes, FLOPs and operations.

A step of training (with its KL and LM terms, adapters, bfloat16 autocast, fused AdamW) runs over
torch's fake tensors, which have shapes and no content. So what is counted is what the code really asks for, the same
on every machine:

- the bytes of all tensors that are alive at once, weights and optimizer included. An allocator holds some more.
- the FLOPs of the matrix products, beside the useful ones (`step_flops`).
- the operations that start a kernel, which on a GPU take some microseconds each, however small.

The fake tensors lie on a CPU. Which passes are divided, how many rows of logits a chunk has and that keys and values
are appended is as on a GPU; autocast and the attention kernel are the CPU's.
Run with `python tests/benchmarks/step_on_paper.py`, which writes, for Gumbel training, `step_bytes_on_paper_<shape>`
and `step_flops_on_paper_<shape>`; the bytes of a policy-gradient step, `step_bytes_on_paper_<shape>_policy_gradient`;
and of the plan's step (`spec_reference`) with adapters, `step_flops_vs_reference_on_paper_<shape>`. Warm start, which
keeps less than either, asks the device which rows draw their text, and fake tensors cannot say.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_shapes import ADAPTERS, GROUP_SIZE, SHAPES, Shape
from harness import prepare, write_result
from spec_reference import SpecStep
from step_flops import Texts, useful_flops
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from flop_count import Flops  # noqa: E402
from live_bytes import LiveBytes  # noqa: E402

from consistency_lens import (  # noqa: E402
    ConsistencyLensModel,
    adapters,
    cached_passes,
    rounded_weights,
    straight_through,
)
from consistency_lens.adapters import adapters_at_once  # noqa: E402
from consistency_lens.data.activation_source import ActivationSource  # noqa: E402
from consistency_lens.data.collator import ActivationCollator  # noqa: E402
from consistency_lens.data.on_the_fly import ContextRows, read_activations  # noqa: E402
from consistency_lens.data.passes_by_length import PassesByLength  # noqa: E402
from consistency_lens.data.shared_contexts import SharedContexts  # noqa: E402
from consistency_lens.training.lm_reference import SubjectReference  # noqa: E402
from consistency_lens.training.objectives import Gumbel, Objective, PolicyGradient, Step  # noqa: E402

DEVICE_BYTES = 80 * 10**9
# Of these nothing runs: they look at a tensor in another way, or make room for one.
NO_KERNEL = {
    "view", "_unsafe_view", "_reshape_alias", "as_strided", "detach", "alias", "expand", "transpose", "t", "permute",
    "slice", "select", "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "chunk", "empty", "empty_like",
    "new_empty", "empty_strided", "lift_fresh", "device", "is_same_size",
}  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts the operations that start a kernel, in `count`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket.__name__ not in NO_KERNEL
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class OnPaper:
    """What a step takes: the most `bytes` at once, those of weights among them, `flops` and `kernels`."""

    bytes: int
    flops: int
    kernels: int


def make_rows(shape: Shape, lens: ConsistencyLensModel, count: int) -> list[dict[str, Any]]:
    """So many rows, K of each sequence."""
    source: ActivationSource = shape.make_source(lens, count)
    return [ContextRows(source)[row] for row in range(count)]


def make_batch(shape: Shape, lens: ConsistencyLensModel, objective: str = "gumbel") -> dict[str, Any]:
    """The batch of a step as the trainer's loader makes it, on a GPU: contexts shared, and read by length."""
    collator = SharedContexts(ActivationCollator(0, shape.num_text_tokens, 1))
    return PassesByLength(collator, cached_passes.PASS_COST)(make_rows(shape, lens, shape.activations(objective)))


def make_plans_batch(shape: Shape, lens: ConsistencyLensModel) -> dict[str, Any]:
    """That of the plan's step: each row with a context of its own, and activations that are there already."""
    rows = ActivationCollator(0, shape.num_text_tokens, 1)(make_rows(shape, lens, shape.batch))
    activations = torch.zeros(shape.batch, shape.sizes["hidden_size"])
    return rows | {"activations": activations, "other_activations": activations}


def faked(mode: FakeTensorMode, roots: list[nn.Module], batch: dict[str, Any]) -> dict[str, Any]:
    """Puts fake tensors in place of all parameters and buffers, one for each, however many modules share it; returns
    those of the batch."""
    fakes: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            made: Tensor = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            fakes[id(tensor)] = (made, tensor)  # the tensor too, so that no other one gets its id
        return fakes[id(tensor)][0]

    for module in {id(module): module for root in roots for module in root.modules()}.values():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
    return {name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


def our_terms(
    lens: ConsistencyLensModel,
    batch: dict[str, Any],
    name: str = "gumbel",
    around: Callable[[nn.Module], AbstractContextManager] = adapters_at_once,
) -> dict[str, Tensor]:
    """The terms of an objective, as the GPU benchmark trains it; `around`: what the lens runs in."""
    subject, reference = lens.subject, SubjectReference(lens.subject)
    objective: Objective = {
        "gumbel": Gumbel(subject, reference, "reverse", needs_entropy=False),
        "policy_gradient": PolicyGradient(reference, GROUP_SIZE, straight_through=True),
    }[name]
    with around(lens):
        read = read_activations(subject, batch, keep_context=objective.needs_kl)
        return objective(lens, lens, read, Step(0, 0)).terms


def counted(roots: list[nn.Module], terms: Callable[[], dict[str, Tensor]]) -> OnPaper:
    """What a whole step takes that makes these terms, with adapters as they are trained; the tensors of `roots`
    count too."""
    trained = [parameter for parameter in roots[0].parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    weights = {id(t.untyped_storage()): t.untyped_storage().nbytes() for root in roots for t in tensors_of(root)}
    with LiveBytes(nn.ModuleList(roots)) as live, Flops(with_attention=True) as flops, Kernels() as kernels:
        with torch.autocast("cpu", torch.bfloat16):
            made = terms()
        # under the Gumbel objective the squared error is only told
        torch.stack([term for name, term in made.items() if name != "mse" or "kl" not in made]).sum().backward()
        optimizer.step()
    return OnPaper(live.peak + sum(weights.values()), flops.count, kernels.count)


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextmanager
def as_on_a_gpu(lens: ConsistencyLensModel) -> Iterator[None]:
    """Has what depends on the device go the way of a GPU, though the fake tensors say that they lie on a CPU; and of
    ordinary weights, though they are of a kind of their own."""
    lens.decoder.attends_in_place = False
    with (
        mock.patch.object(cached_passes, "PASS_COST_ON_CPU", cached_passes.PASS_COST),
        mock.patch.object(straight_through, "CHUNK_ELEMENTS_ON_CPU", straight_through.CHUNK_ELEMENTS),
        mock.patch.object(adapters, "is_whole", lambda weight: weight.ndim == 2),
        mock.patch.object(rounded_weights, "is_whole", lambda weight: weight.ndim == 2),
    ):
        yield


def on_paper(shape: Shape, objective: str = "gumbel") -> tuple[OnPaper, float]:
    """What a step of a shape takes, and its useful FLOPs."""
    with torch.device("meta"):
        lens = shape.make_lens("meta")
    lens.subject._checked_length = float("inf")  # its check compares numbers, and there are none
    batch, roots = make_batch(shape, lens, objective), [lens, lens.subject.model]
    useful = useful_flops(lens, objective, Texts.of(batch, shape.num_text_tokens), GROUP_SIZE)
    with as_on_a_gpu(lens), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = faked(mode, roots, batch)
        return counted(roots, lambda: our_terms(lens, batch, objective)), useful


def make_plan(lens: ConsistencyLensModel) -> SpecStep:
    """The plan's step with adapters."""
    return SpecStep(lens, training="lora", lora=ADAPTERS)


def plan_on_paper(shape: Shape) -> OnPaper:
    """What the plan's step takes."""
    with torch.device("meta"):
        lens = shape.make_lens("meta")
        plan = make_plan(lens)
    batch = make_plans_batch(shape, lens)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = faked(mode, [plan], batch)
        return counted([plan], lambda: plan(batch))


def main() -> None:
    """Counts all shapes, or those that are named."""
    prepare()
    device = torch.device("cpu")  # whatever there is, it is not used
    for name in sys.argv[1:] or SHAPES:
        shape = SHAPES[name]
        for objective in ("gumbel", "policy_gradient"):
            step, useful = on_paper(shape, objective)
            what = (
                f"a {objective} step of a lens with adapters over a Llama of the {name} shape, bfloat16, "
                f"B={shape.activations(objective)} S={shape.length} T={shape.num_text_tokens} K={shape.positions}, "
                "counted over tensors without content"
            )
            against = f"bytes of all tensors at once, {what}, {step.kernels:,} kernels, against a device of 80 GB"
            suffix = "" if objective == "gumbel" else f"_{objective}"
            write_result(f"step_bytes_on_paper_{name}{suffix}", against, "bytes", step.bytes, DEVICE_BYTES, 1, device)
            if objective == "gumbel":
                against = f"FLOPs of matrix products, {what}, against the useful ones"
                write_result(f"step_flops_on_paper_{name}", against, "FLOPs", step.flops, useful, 1, device)
                measure_plan(shape, step.flops / shape.batch, what, device)


def measure_plan(shape: Shape, ours: float, what: str, device: torch.device) -> None:
    """Writes the FLOPs of an activation in our step and in the plan's."""
    few = replace(shape, batch=shape.positions)  # of more activations, each takes as many, and padding beside
    theirs = plan_on_paper(few).flops / few.batch
    against = f"FLOPs of matrix products, {what}, against the plan's with adapters, B={few.batch} of one sequence"
    name = f"step_flops_vs_reference_on_paper_{shape.name}"
    write_result(name, against, "FLOPs an activation", ours, theirs, 1, device)


if __name__ == "__main__":
    main()
