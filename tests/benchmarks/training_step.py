"""A training step, time and peak memory: ours against the step of the method's plan (`spec_reference`).

Both sides take a whole step with the same losses (KL and LM, with A' and the residual it leaves), fully trained clones
and fused AdamW, from the same activations; `tests/test_spec_reference.py` holds that losses and gradients are equal.
Two models: the embedded one, and 12 blocks of width 512 with a vocabulary of 32,000 and random weights.

Run with `python tests/benchmarks/training_step.py`. It writes, for the large model (and `<name>_tiny_stories`):
`step_vs_reference` and `step_vs_reference_k8` (8 activations of a sequence), seconds; `step_vs_cached_reference`,
where the plan's generation has a key-value cache; `step_memory_vs_reference`, the peak of a process that builds its
models and takes two steps; `kl_share_of_step`, what of a step the subject's judgement costs, K=8.
"""

import multiprocessing
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
from tiny_lenses import tiny_tokenizer  # noqa: E402

from consistency_lens import ConsistencyLensModel  # noqa: E402
from consistency_lens.data.on_the_fly import read_activations  # noqa: E402
from consistency_lens.data.shared_contexts import share_contexts  # noqa: E402
from consistency_lens.training.lm_reference import SubjectReference  # noqa: E402
from consistency_lens.training.objectives import Gumbel, Step  # noqa: E402

LENGTH, NUM_TEXT_TOKENS, MIN_POSITION = 128, 8, 10
LM_WEIGHT, LEARNING_RATE = 0.3, 1e-4
EMBEDDED = Path(__file__).parents[2] / "examples" / "tiny_stories"


@dataclass(frozen=True)
class Setting:
    """A model and how many activations a step has."""

    suffix: str
    batch: int
    layer: int
    runs: int

    def make_lens(self) -> ConsistencyLensModel:
        torch.manual_seed(0)
        if self.suffix:
            model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
            tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
        else:
            config = LlamaConfig(
                vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=12,
                num_attention_heads=8, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
            model, tokenizer = LlamaForCausalLM(config), tiny_tokenizer()
        return ConsistencyLensModel.from_subject(
            model, tokenizer, self.layer, num_text_tokens=NUM_TEXT_TOKENS, training="full"
        ).train()


SETTINGS = (
    Setting(suffix="", batch=32, layer=6, runs=5),
    Setting(suffix="_tiny_stories", batch=64, layer=2, runs=9),
)


def make_batch(lens: ConsistencyLensModel, batch: int, num_positions: int) -> dict[str, Any]:
    """Rows of random sequences, one at its last token or K each at random ones, with their activations."""
    generator = torch.Generator().manual_seed(0)
    num_sequences, vocabulary = batch // num_positions, lens.subject.model.config.vocab_size
    input_ids = torch.randint(3, vocabulary, (num_sequences, LENGTH), generator=generator)
    if num_positions == 1:
        positions = torch.full((batch,), LENGTH - 1)
    else:
        order = torch.rand(num_sequences, LENGTH - MIN_POSITION, generator=generator).argsort(-1)
        positions = (MIN_POSITION + order[:, :num_positions]).flatten()
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
    return rows | {"activations": activations, "other_activations": activations.roll(num_positions, 0)}


def ours(lens: ConsistencyLensModel, batch: dict[str, Any], kl: bool = True) -> Callable[[], None]:
    """Our step: the contexts of a sequence are shared, and read once for activations and KL."""
    subject = lens.subject
    objective = Gumbel(
        subject, SubjectReference(subject), "forward", delta_residual="detached", needs_kl=kl, needs_entropy=False
    )
    shared = share_contexts(batch)

    def losses() -> dict[str, torch.Tensor]:
        return objective(lens, lens, read_activations(subject, shared, keep_context=kl), Step(0, 0)).terms

    return step_of(lens, losses)


def theirs(lens: ConsistencyLensModel, batch: dict[str, Any], kl: bool = True, cached: bool = False) -> Callable:
    """The plan's step."""
    plan = SpecStep(lens, cached=cached)
    return step_of(plan, lambda: plan(batch, judged=kl))


def step_of(model: torch.nn.Module, losses: Callable[[], dict[str, torch.Tensor]]) -> Callable[[], None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def step() -> None:
        terms = losses()
        loss = LM_WEIGHT * terms["lm"] + (terms["kl"] if "kl" in terms else 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_times(setting: Setting, device: torch.device) -> None:
    """Writes what a step takes."""
    lens = setting.make_lens().to(device)
    model = f"{type(lens.subject.model).__name__} of {lens.subject.model.num_parameters() / 1e6:.1f}M parameters"
    what = f"training step, {model}, layer {setting.layer}, B={setting.batch} S={LENGTH} T={NUM_TEXT_TOKENS}"
    batch = make_batch(lens, setting.batch, 1)
    sides = {"ours": ours(lens, batch), "plan": theirs(lens, batch), "cached": theirs(lens, batch, cached=True)}
    medians = interleaved(sides, device, setting.runs)
    for name, side in (("step_vs_reference", "plan"), ("step_vs_cached_reference", "cached")):
        write(name, f"{what} K=1 against the plan's", "seconds", medians["ours"], medians[side], setting, device)
    batch = make_batch(lens, setting.batch, 8)
    sides = {
        "ours": ours(lens, batch),
        "ours without": ours(lens, batch, kl=False),
        "plan": theirs(lens, batch),
        "plan without": theirs(lens, batch, kl=False),
    }
    medians = interleaved(sides, device, setting.runs)
    what = f"{what} K=8"
    write(
        "step_vs_reference_k8",
        f"{what} against the plan's",
        "seconds",
        medians["ours"],
        medians["plan"],
        setting,
        device,
    )
    shares = {side: 1 - medians[f"{side} without"] / medians[side] for side in ("ours", "plan")}
    what = f"what of a {what} the KL costs, in the plan's and in ours, which reads its activations on the fly"
    write("kl_share_of_step", what, "of a step", shares["ours"], shares["plan"], setting, device)


def peak_bytes(setting: Setting, side: str) -> int:
    """By how much the memory of this process, which has done nothing yet, rises at most; on a GPU, what it takes."""
    device = prepare()
    before = memory("VmRSS", device)
    lens = setting.make_lens().to(device)
    batch = make_batch(lens, setting.batch, 1)
    step = {"ours": ours, "plan": theirs}[side](lens, batch)
    if side == "plan":
        # the plan's step has its own copies
        lens = None
    for _ in range(2):
        step()
    return memory("VmHWM", device) - before


def memory(field: str, device: torch.device) -> int:
    """A field of /proc/self/status in bytes; on a GPU, the peak that was allocated."""
    if device.type == "cuda":
        return 0 if field == "VmRSS" else torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure_memory(setting: Setting, device: torch.device) -> None:
    """Writes what a step holds at most, weights and optimizer included."""
    peaks = {}
    for side in ("ours", "plan"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peaks[side] = pool.submit(peak_bytes, setting, side).result()
    what = (
        f"peak memory of models, optimizer and two training steps, layer {setting.layer}, "
        f"B={setting.batch} S={LENGTH} T={NUM_TEXT_TOKENS} K=1 against the plan's"
    )
    write("step_memory_vs_reference", what, "bytes", peaks["ours"], peaks["plan"], setting, device)


def write(name: str, what: str, unit: str, mine: float, other: float, setting: Setting, device: torch.device) -> None:
    runs = 1 if unit == "bytes" else setting.runs
    write_result(f"{name}{setting.suffix}", what, unit, mine, other, runs, device)


def main() -> None:
    """Measures both models."""
    device = prepare()
    for setting in SETTINGS:
        if not sys.argv[1:] or "memory" in sys.argv:
            measure_memory(setting, device)
        if not sys.argv[1:] or "times" in sys.argv:
            measure_times(setting, device)


if __name__ == "__main__":
    main()
