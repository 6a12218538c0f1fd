"""A training step, time and peak memory: ours against the step of the method's plan (`spec_reference`).

Both sides take a whole step with the same losses (KL and LM, with A' and the residual it leaves), fully trained clones
and fused AdamW, from the same activations; `tests/test_spec_reference.py` holds that losses and gradients are equal.
Positions P are drawn as the plan draws them, uniformly between the tenth token and the last but one; a context is the
tokens up to P, padded to the longest of the batch.
Two models: the embedded one, and 12 blocks of width 512 with a vocabulary of 32,000 and random weights.

Run with `python tests/benchmarks/training_step.py`. It writes, for the large model (and `<name>_tiny_stories`):
`step_vs_reference` and `step_vs_reference_k8` (8 activations of a sequence), seconds; `step_vs_cached_reference`,
where the plan's generation has a key-value cache; `step_memory_vs_reference`, the peak of a process that builds its
models and takes two steps; `step_vs_reference_larger_batch` and `_k8`, seconds an activation where our step takes more
activations at a time, still in less memory than the plan's, as `step_memory_of_larger_batch` and `_k8` show;
`step_flops_vs_reference` and `step_flops_vs_cached_reference`, also for `_k8` and for `_last`, where every P is the
last token, so that no context is shorter than another, FLOPs of an activation;
`kl_share_of_step`, what of a step the subject's judgement costs more than a squared error, K=8.
"""

import functools
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, prepare, write_result
from spec_reference import SpecStep
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from flop_count import flops  # noqa: E402
from tiny_lenses import tiny_tokenizer  # noqa: E402

from consistency_lens import ConsistencyLensModel  # noqa: E402
from consistency_lens.cached_passes import cost_on  # noqa: E402
from consistency_lens.data.on_the_fly import read_activations  # noqa: E402
from consistency_lens.data.passes_by_length import read_by_length  # noqa: E402
from consistency_lens.data.shared_contexts import share_contexts  # noqa: E402
from consistency_lens.training.lm_reference import SubjectReference  # noqa: E402
from consistency_lens.training.objectives import Gumbel, Step  # noqa: E402

LENGTH, NUM_TEXT_TOKENS, MIN_POSITION = 128, 8, 10
Losses = Callable[[], dict[str, torch.Tensor]]

LM_WEIGHT, LEARNING_RATE = 0.3, 1e-4
EMBEDDED = Path(__file__).parents[2] / "examples" / "tiny_stories"


@dataclass(frozen=True)
class Setting:
    """A model and how many activations a step has: as many on both sides, or on ours the larger batch of each K.

    `runs`: steps that are timed; `processes`: of which the median peak is taken, for how a small heap is laid out
    differs by a quarter from one to the next.
    """

    suffix: str
    layer: int
    batch: int
    larger: dict[int, int]
    runs: int
    processes: int

    def make_lens(self, vocabulary: int = 32_000, **clones: Any) -> ConsistencyLensModel:
        """Fully trained if `clones` says nothing else; the embedded model has a vocabulary of its own."""
        torch.manual_seed(0)
        if self.suffix:
            model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
            tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
        else:
            config = LlamaConfig(
                vocab_size=vocabulary, hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
                num_attention_heads=8, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
            model, tokenizer = LlamaForCausalLM(config), tiny_tokenizer()
        return ConsistencyLensModel.from_subject(
            model, tokenizer, self.layer, num_text_tokens=NUM_TEXT_TOKENS, **(clones or {"training": "full"})
        ).train()


# The more activations a step has, the less of it is weights and optimizer, which are alike on both sides, and calls.
# The larger batches take less memory than the plan's step; those with K=1 less than 0.45 of it.
SETTINGS = (
    Setting(suffix="_tiny_stories", layer=2, batch=256, larger={1: 640, 8: 1024}, runs=11, processes=3),
    Setting(suffix="", layer=6, batch=96, larger={1: 256, 8: 512}, runs=3, processes=1),
)
NUM_COUNTED = 32  # activations whose FLOPs are counted; of more, each takes as many or fewer


def make_batch(lens: ConsistencyLensModel, batch: int, num_positions: int, last: bool = False) -> dict[str, Any]:
    """Rows of random sequences, K of each at random positions or one at its `last` token, with their activations."""
    generator = torch.Generator().manual_seed(0)
    num_sequences, vocabulary = batch // num_positions, lens.subject.model.config.vocab_size
    input_ids = torch.randint(3, vocabulary, (num_sequences, LENGTH), generator=generator)
    order = torch.rand(num_sequences, LENGTH - 1 - MIN_POSITION, generator=generator).argsort(-1)
    positions = (MIN_POSITION + order[:, :num_positions]).flatten()
    if last:
        positions = torch.full((batch,), LENGTH - 1)
    longest = int(positions.max()) + 1
    mask = (torch.arange(longest) <= positions[:, None]).long()
    rows = {
        "input_ids": input_ids.repeat_interleave(num_positions, 0)[:, :longest] * mask,
        "attention_mask": mask,
        "positions": positions,
        "rows": torch.arange(batch),
    }
    activations = read_activations(lens.subject, share_contexts(rows), keep_context=False)["activations"]
    mean = activations.mean(0)
    lens.set_statistics(mean, (activations - mean).square().mean().sqrt())
    # A' is the activation of another sequence of the batch: ours takes its Â' from there, too
    mates = torch.arange(batch).roll(num_positions)
    return rows | {"activations": activations, "other_activations": activations[mates], "mates": mates}


def our_losses(lens: ConsistencyLensModel, batch: dict[str, Any], kl: bool = True, chunk_size: int = 0) -> Losses:
    """Of our step: the contexts of a sequence are shared, and read once for activations and KL, by length.

    `chunk_size`: rows of logits held at a time; 0 holds all of them.
    """
    subject = lens.subject
    objective = Gumbel(
        subject,
        SubjectReference(subject),
        "forward",
        "detached",
        needs_kl=kl,
        needs_entropy=False,
        chunk_size=chunk_size,
    )
    by_length = read_by_length(share_contexts(batch), cost_on(lens.device))

    def losses() -> dict[str, torch.Tensor]:
        read = read_activations(subject, by_length, keep_context=kl, with_head=chunk_size == 0)
        return objective(lens, lens, read, Step(0, 0)).terms

    return losses


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def take_step(losses: Losses, optimizer: torch.optim.Optimizer) -> None:
    terms = losses()
    # without the KL another term takes the gradient to the encoder, as it would in training
    loss = LM_WEIGHT * terms["lm"] + (terms["kl"] if "kl" in terms else terms["mse"])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@dataclass(frozen=True)
class Sides:
    """Our model and those of the plan, each with its optimizer."""

    lens: ConsistencyLensModel
    plans: dict[str, SpecStep]
    optimizers: dict[str, torch.optim.Optimizer]

    @classmethod
    def of(cls, lens: ConsistencyLensModel, device: torch.device) -> "Sides":
        plans = {"plan": SpecStep(lens).to(device), "cached": SpecStep(lens, cached=True).to(device)}
        optimizers = {name: make_optimizer(model) for name, model in {**plans, "ours": lens}.items()}
        return cls(lens, plans, optimizers)

    def steps(self, batch: dict[str, Any], kl: bool = True) -> dict[str, Callable[[], None]]:
        """A step of each on a batch."""
        losses: dict[str, Losses] = {
            name: functools.partial(plan, batch, judged=kl) for name, plan in self.plans.items()
        }
        losses["ours"] = our_losses(self.lens, batch, kl)
        return {name: functools.partial(take_step, of, self.optimizers[name]) for name, of in losses.items()}


def measure_times(setting: Setting, device: torch.device, num_positions: int = 1) -> None:
    """Writes what a step takes."""
    lens = setting.make_lens().to(device)
    model = f"{type(lens.subject.model).__name__} of {lens.subject.model.num_parameters() / 1e6:.1f}M parameters"
    what = (
        f"training step, {model}, layer {setting.layer}, B={setting.batch} S={LENGTH} T={NUM_TEXT_TOKENS} "
        f"K={num_positions} against the plan's"
    )
    suffix = "" if num_positions == 1 else f"_k{num_positions}"
    sides = Sides.of(lens, device)
    if suffix:
        del sides.plans["cached"]
    work, larger = sides.steps(make_batch(lens, setting.batch, num_positions)), setting.larger[num_positions]
    of_larger = our_losses(lens, make_batch(lens, larger, num_positions))
    work["larger"] = functools.partial(take_step, of_larger, sides.optimizers["ours"])
    medians = interleaved(work, device, setting.runs, warmup=1)
    ours, plan = medians["ours"], medians["plan"]
    write(f"step_vs_reference{suffix}", what, "seconds", ours, plan, setting, device)
    if "cached" in medians:
        cached = medians["cached"]
        write(f"step_vs_cached_reference{suffix}", f"{what}, cached", "seconds", ours, cached, setting, device)
    write(
        f"step_vs_reference_larger_batch{suffix}",
        f"{what}, ours B={larger}",
        "seconds an activation",
        medians["larger"] / larger,
        plan / setting.batch,
        setting,
        device,
    )


def measure_share(setting: Setting, device: torch.device) -> None:
    """Writes what of a step the subject's judgement costs more than a squared error, on both sides."""
    lens = setting.make_lens().to(device)
    sides = Sides.of(lens, device)
    del sides.plans["cached"]
    batch = make_batch(lens, setting.batch, 8)
    work = sides.steps(batch)
    work |= {f"{name} without": step for name, step in sides.steps(batch, kl=False).items()}
    medians = interleaved(work, device, setting.runs, warmup=1)
    shares = {side: 1 - medians[f"{side} without"] / medians[side] for side in ("ours", "plan")}
    what = (
        f"what of a step a KL costs more than a squared error, layer {setting.layer}, B={setting.batch} S={LENGTH} "
        f"T={NUM_TEXT_TOKENS} K=8, in the plan's step and in ours, which reads its activations on the fly"
    )
    write("kl_share_of_step", what, "of a step", shares["ours"], shares["plan"], setting, device)


def check_models(lens: ConsistencyLensModel) -> None:
    """Has a lens make now what it tries once a process, so that it is not counted as a step's."""
    lens.subject.check_one_token(2 * LENGTH)
    lens.decoder.may_attend_in_place(LENGTH)


def measure_flops(setting: Setting, device: torch.device) -> None:
    """Writes how many FLOPs of matrix products a step makes for each activation: the same on every machine."""
    lens = setting.make_lens().to(device)
    sides = Sides.of(lens, device)
    for num_positions, suffix in ((1, ""), (8, "_k8"), (1, "_last")):
        check_models(lens)
        work = sides.steps(make_batch(lens, NUM_COUNTED, num_positions, last=suffix == "_last"))
        counts = {name: flops(step) / NUM_COUNTED for name, step in work.items()}
        what = f"a step's matrix products, layer {setting.layer}, S={LENGTH} T={NUM_TEXT_TOKENS} K={num_positions}"
        if suffix == "_last":
            what += ", P the last token,"
        for name, side in (("step_flops_vs_reference", "plan"), ("step_flops_vs_cached_reference", "cached")):
            against = f"{what} against the plan's{', cached' if side == 'cached' else ''}"
            write(f"{name}{suffix}", against, "FLOPs an activation", counts["ours"], counts[side], setting, device)


def peak_bytes(setting: Setting, side: str, batch: int, num_positions: int) -> int:
    """By how much the memory of this process, which has done nothing yet, rises at most; on a GPU, what it takes."""
    device = prepare()
    before = memory("VmRSS", device)
    lens = setting.make_lens().to(device)
    # the first step makes the states of the optimizer, which are there during the second
    batches = [make_batch(lens, num_positions * size, num_positions) for size in (2, batch // num_positions)]
    if side == "ours":
        optimizer, losses = make_optimizer(lens), [our_losses(lens, batch) for batch in batches]
    else:
        plan = SpecStep(lens)
        del lens  # the plan has its own copies
        optimizer, losses = make_optimizer(plan), [functools.partial(plan, batch) for batch in batches]
    for of_step in losses:
        take_step(of_step, optimizer)
    return memory("VmHWM", device) - before


def memory(field: str, device: torch.device) -> int:
    """A field of /proc/self/status in bytes; on a GPU, the peak that was allocated."""
    if device.type == "cuda":
        return 0 if field == "VmRSS" else torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure_memory(setting: Setting, device: torch.device) -> None:
    """Writes what a step holds at most, weights and optimizer included."""

    def peak(side: str, batch: int, num_positions: int) -> float:
        spawn, peaks = multiprocessing.get_context("spawn"), []
        for _ in range(setting.processes):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                peaks.append(pool.submit(peak_bytes, setting, side, batch, num_positions).result())
        return statistics.median(peaks)

    for num_positions, larger in setting.larger.items():
        plan = peak("plan", setting.batch, num_positions)
        what = (
            f"peak memory of models, optimizer and two training steps, layer {setting.layer}, "
            f"B={setting.batch} S={LENGTH} T={NUM_TEXT_TOKENS} K={num_positions} against the plan's"
        )
        suffix = "" if num_positions == 1 else f"_k{num_positions}"
        mine = {
            f"step_memory_vs_reference{suffix}": (what, peak("ours", setting.batch, num_positions)),
            f"step_memory_of_larger_batch{suffix}": (f"{what}, ours B={larger}", peak("ours", larger, num_positions)),
        }
        for name, (of, ours) in mine.items():
            write(name, of, "bytes", ours, plan, setting, device)


def write(name: str, what: str, unit: str, mine: float, other: float, setting: Setting, device: torch.device) -> None:
    timed = unit in ("seconds", "seconds an activation", "of a step")
    runs = setting.runs if timed else setting.processes if unit == "bytes" else 1
    write_result(f"{name}{setting.suffix}", what, unit, mine, other, runs, device)


MEASURES = {
    "flops": measure_flops,
    "memory": measure_memory,
    "times": measure_times,
    "times_k8": functools.partial(measure_times, num_positions=8),
    "share": measure_share,
}


def main() -> None:
    """Measures both models, or what is named: `flops`, `memory`, `times`, `times_k8`, `share`, `large`, `embedded`."""
    device, named = prepare(), set(sys.argv[1:])
    for setting in SETTINGS:
        if {"large", "embedded"} & named and ("embedded" if setting.suffix else "large") not in named:
            continue
        for part, measure in MEASURES.items():
            if not MEASURES.keys() & named or part in named:
                measure(setting, device)


if __name__ == "__main__":
    main()
