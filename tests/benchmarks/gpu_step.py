"""A training step on GPUs: lenses over Llamas of the 1B and 7B shapes, each objective, eager and compiled.

    python tests/benchmarks/gpu_step.py
    python tests/benchmarks/gpu_step.py --shapes 7b --objectives gumbel --modes compile
    torchrun --nproc_per_node 8 tests/benchmarks/gpu_step.py
    accelerate launch --config_file examples/accelerate/fsdp2.yaml tests/benchmarks/gpu_step.py --modes eager

Writes `gpu_step_<case>.json` into `results/gpu`, and `docs/gpu.md` from all that lies there; with `--results FOLDER`
all of it goes there. `--tiny FOLDER` goes the same way with a tiny model on the CPU and writes there, so that the
script can be tested without a GPU; what it measures then means nothing.

The steps are those of `ConsistencyLensTrainer`, without the wait for the loader: rows read on the fly, K=8 of a
sequence, bfloat16 autocast, adapters where PEFT is installed, fused AdamW; `in_place` is eager, with one buffer of
keys and values for the tokens of a text (`LensDecoder.attends_in_place`). On one process the plan's step
(`spec_reference`, also with adapters, in bfloat16, from activations that are there already) runs in turn with the
Gumbel steps, with as many activations as ours, or half of them, a quarter and so on until they fit beside our models.
MFU is the useful FLOPs of a step (`step_flops`) / (its seconds x the device's dense bfloat16 peak).
"""

import argparse
import functools
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# what the two sides need in turn differs in size, and would else be looked for anew
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import torch  # noqa: E402
from gpu_page import write_page  # noqa: E402
from gpu_shapes import ADAPTERS, GROUP_SIZE, SHAPES, TINY, Shape  # noqa: E402
from harness import PAGE, RESULTS, machine, seconds, versions  # noqa: E402
from spec_reference import SpecStep  # noqa: E402
from step_flops import Texts, useful_flops  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from consistency_lens.adapters import adapters_at_once  # noqa: E402
from consistency_lens.data.collator import ActivationCollator  # noqa: E402
from consistency_lens.data.on_the_fly import ContextRows, read_activations  # noqa: E402
from consistency_lens.training.arguments import ConsistencyLensTrainingArguments  # noqa: E402
from consistency_lens.training.callbacks import peak_memory_bytes  # noqa: E402
from consistency_lens.training.dry_run import launched_strategy  # noqa: E402
from consistency_lens.training.trainer import ConsistencyLensTrainer  # noqa: E402

OBJECTIVES, MODES = ("gumbel", "warm_start", "policy_gradient"), ("eager", "in_place", "compile")
LM_WEIGHT, LEARNING_RATE = 0.1, 1e-4
PASS = 32  # contexts that are read at a time for the plan's rows
# Dense bfloat16 FLOPs a second, as the makers state them; the longest name that a device's begins with counts.
PEAKS = {
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12, "NVIDIA H200 NVL": 835e12, "NVIDIA GH200": 989e12, "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12,
}  # fmt: skip


class Opponent:
    """The plan's step with a batch that fits: as large as ours, or halved until it does.

    Attributes:
        batch: activations of a step; 0 where not even those of one sequence fit.
        bytes: the peak of a step and its models, without what was there before.
        all_seconds: of each step that was timed.
    """

    def __init__(self, lens: Any, source: Any, shape: Shape, batch: int, clones: str) -> None:
        self.device, self.all_seconds = lens.device, list[float]()
        self.rows, self.batch = read_rows(source, lens, shape, batch), batch
        before = allocated(self.device)
        self.plan = SpecStep(lens, training=clones, lora=ADAPTERS if clones == "lora" else None)
        trained = [parameter for parameter in self.plan.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
        while self.batch > 0 and not self.fits():
            self.batch = self.batch // (2 * shape.positions) * shape.positions
        self.bytes = allocated(self.device, most=True) - before

    def fits(self) -> bool:
        """Takes a step; whether there was room for it."""
        reset_peak(self.device)
        try:
            self.step()
        except RuntimeError as error:
            if not is_of_memory(error):
                raise
            self.optimizer.zero_grad()
            return False
        return True

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16), adapters_at_once(self.plan):
            terms = self.plan({name: values[: self.batch] for name, values in self.rows.items()})
        (terms["kl"] + LM_WEIGHT * terms["lm"]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self) -> None:
        """Times a step."""
        if self.batch > 0:
            self.all_seconds.append(seconds(self.step, self.device))


class Rounds(TrainerCallback):
    """Seconds of each of our steps after `warmup` others, in turn with those of an opponent, which is made then.

    Attributes:
        peak: bytes that the steps before took at most, but for the first one's.
        retries: how often the device was full, and memory had to be given back, in the steps that were timed.
    """

    def __init__(self, device: torch.device, warmup: int, make_opponent: Callable[[], Opponent] | None) -> None:
        self.device, self.warmup, self.make_opponent = device, warmup, make_opponent
        self.opponent: Opponent | None = None
        self.all_seconds: list[float] = []
        self.peak = self.retries = 0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            reset_peak(self.device)
        self.retries_before = retries(self.device)
        self.since = now(self.device)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        elapsed = now(self.device) - self.since
        if state.global_step > self.warmup:
            self.all_seconds.append(elapsed)
            self.retries += retries(self.device) - self.retries_before
            if self.opponent is not None:
                self.opponent.measure()
        elif state.global_step == self.warmup:
            self.peak = allocated(self.device, most=True)
            if self.make_opponent is not None:
                self.opponent = self.make_opponent()


def is_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no room, which torch tells in more than one way."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def now(device: torch.device) -> float:
    """The time when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def allocated(device: torch.device, most: bool = False) -> int:
    """Bytes of tensors on a GPU, now or the `most` since `reset_peak`; of a process, the most that it ever had."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" and not most else peak_memory_bytes(device)


def retries(device: torch.device) -> int:
    """How often the device had no room until memory was given back."""
    return torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def read_rows(source: Any, lens: Any, shape: Shape, count: int) -> dict[str, torch.Tensor]:
    """The first rows of a source with their activations, each with a context of its own, as the plan reads them."""
    collator = ActivationCollator(0, shape.num_text_tokens, bos_token_id=1)
    rows = collator([ContextRows(source)[index] for index in range(count)])
    on_device = {name: values.to(lens.device) for name, values in rows.items()}
    parts = [{name: values[i : i + PASS] for name, values in on_device.items()} for i in range(0, count, PASS)]
    read = [read_activations(lens.subject, part, keep_context=False)["activations"] for part in parts]
    activations = torch.cat(read)
    kept = ("input_ids", "attention_mask", "positions")
    others = activations.roll(shape.positions, 0)  # of another sequence
    return {name: on_device[name] for name in kept} | {"activations": activations, "other_activations": others}


def measure(options: argparse.Namespace, shape: Shape, objective: str, mode: str) -> dict[str, Any]:
    """Trains for a few steps and returns what they took."""
    batch, steps = options.batch or shape.activations(objective), options.warmup + options.steps
    args = ConsistencyLensTrainingArguments(
        output_dir=str(options.results / "run"), stages=[objective], max_steps=steps, bf16=True,
        per_device_train_batch_size=batch, positions_together=shape.positions, learning_rate=LEARNING_RATE,
        use_cpu=options.tiny is not None, torch_compile=mode == "compile", lm_reference="subject",
        lm_weight=[str(LM_WEIGHT)], delta_residual="detached", straight_through=True, group_size=GROUP_SIZE,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, dataloader_num_workers=2,
    )  # fmt: skip
    lens = shape.make_lens(args.device, options.clones)
    lens.decoder.attends_in_place = mode == "in_place"
    lens.set_statistics(torch.zeros(shape.sizes["hidden_size"]), 1.0)
    source = shape.make_source(lens, batch * args.world_size * steps)
    lengths = source.lengths.reshape(-1, shape.positions).max(axis=1)
    texts = Texts(batch, batch // shape.positions, float(lengths.mean()), shape.num_text_tokens)
    # now, for weights that are spread over processes have no sizes later
    flops = useful_flops(lens, objective, texts, GROUP_SIZE, args.own_share)
    opponent = None
    if objective == "gumbel" and args.world_size == 1 and not options.alone:
        opponent = functools.partial(Opponent, lens, source, shape, batch, options.clones)
    rounds = Rounds(args.device, options.warmup, opponent)
    ConsistencyLensTrainer(
        model=lens,
        args=args,
        train_dataset=ContextRows(source),
        data_collator=ActivationCollator(0, shape.num_text_tokens, bos_token_id=1),
        callbacks=[rounds],
    ).train()
    return result_of(options, shape, objective, mode, args, rounds, flops)


def result_of(
    options: argparse.Namespace, shape: Shape, objective: str, mode: str, args: Any, rounds: Rounds, flops: float
) -> dict[str, Any]:
    """What was measured, as it is written."""
    taken, peak = statistics.median(rounds.all_seconds), peak_of(args.device)
    strategy = launched_strategy(args.world_size)
    settings = {
        "shape": shape.name, "objective": objective, "mode": mode, "strategy": strategy, "processes": args.world_size,
        "batch": args.per_device_train_batch_size, "S": shape.length, "T": shape.num_text_tokens,
        "K": shape.positions, "clones": options.clones, "subject": shape.sizes, "layer": shape.layer,
    }  # fmt: skip
    result = {
        "name": f"gpu_step_{case_name(shape, objective, mode)}_{options.clones}_{strategy.replace(' ', '_')}"
        f"_{args.world_size}_B{args.per_device_train_batch_size}",
        "unit": "seconds",
        "seconds": taken,
        "all_seconds": rounds.all_seconds,
        "activations_per_second": args.per_device_train_batch_size * args.world_size / taken,
        "peak_memory_bytes": rounds.peak,
        "memory_retries": rounds.retries,
        "useful_flops": flops,
        "mfu": None if peak is None else flops / taken / peak,
        "settings": settings,
        "machine": machine(args.device),
        "versions": versions(),
    }
    other = rounds.opponent
    if other is not None and other.all_seconds:
        of_other = statistics.median(other.all_seconds) / other.batch
        result["plan"] = {
            "batch": other.batch,
            "activations_per_second": 1 / of_other,
            "peak_memory_bytes": other.bytes,
            "ratio": of_other * args.per_device_train_batch_size / taken,
        }
    return result


def peak_of(device: torch.device) -> float | None:
    """Dense bfloat16 FLOPs a second of a device; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [start for start in PEAKS if name.startswith(start)]
    return PEAKS[max(known, key=len)] if known else None


def clones_here() -> str:
    """How the clones are trained: with adapters, but frozen where PEFT is not installed."""
    return "lora" if importlib.util.find_spec("peft") else "frozen"


def cases(options: argparse.Namespace) -> Iterator[tuple[Shape, str, str]]:
    """Shape, objective and mode of each case, those that are asked for first and take the longest last."""
    for mode in options.modes:
        for objective in options.objectives:
            # only Gumbel training keeps keys and values for a backward pass
            if mode != "in_place" or objective == "gumbel":
                yield from ((shape, objective, mode) for shape in options.measured)


def case_name(shape: Shape, objective: str, mode: str) -> str:
    return f"{shape.name}_{objective}_{mode}"


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """Flags, and what follows from them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", type=Path, metavar="FOLDER", help="a tiny model on the CPU; results go there")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where results and page go")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--steps", type=int, default=8, help="steps that are measured")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them, at least 2")
    parser.add_argument("--batch", type=int, help="activations of a step on each device; each shape has its own")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--alone", action="store_true", help="without the plan's step beside ours")
    options = parser.parse_args(argv)
    folder = options.tiny or options.results
    options.measured = [TINY] if options.tiny else [SHAPES[name] for name in options.shapes]
    options.clones = clones_here()
    options.results = folder / "results" if folder else RESULTS / "gpu"
    options.document = folder / "gpu.md" if folder else PAGE
    if options.warmup < 2:
        parser.error(f"--warmup: the first step is not like the others; got {options.warmup}, give 2 or more")
    if num_processes() > 1 and options.minutes < float("inf"):
        parser.error("--minutes: several processes would not agree when they are over; leave it out")
    return options


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def what_is_missing(options: argparse.Namespace) -> str | None:
    """Why nothing can be measured here, or None."""
    if options.tiny is not None:
        return None
    if not torch.cuda.is_available():
        return "there is no GPU here; --tiny FOLDER tries the script itself on a tiny model"
    if torch.cuda.device_count() > 1 and num_processes() == 1:
        return (
            f"got one process and {torch.cuda.device_count()} GPUs; start it by torchrun --nproc_per_node gpu, or let "
            "it see one: CUDA_VISIBLE_DEVICES=0"
        )
    return None


def main(argv: list[str] | None = None) -> int:
    """Measures every case and writes it.

    Returns:
        The exit code: 2 where nothing can be measured, 1 where a case did not fit the device or the time.
    """
    options, start, code = read_options(argv), time.monotonic(), 0
    missing = what_is_missing(options)
    if missing is not None:
        sys.stderr.write(f"gpu_step: {missing}\n")
        return 2
    if options.clones != "lora":
        sys.stdout.write("gpu_step: PEFT is not installed, so the clones are frozen; pip install peft for adapters\n")
    for case in cases(options):
        if time.monotonic() - start > 60 * options.minutes:
            sys.stderr.write(f"gpu_step: {case_name(*case)} is left out, {options.minutes:g} minutes are over\n")
            code = 1
            continue
        make_room()
        try:
            write(options, measure(options, *case))
        except RuntimeError as error:
            if not is_of_memory(error) or num_processes() > 1:  # whose others wait for this one
                raise
            sys.stderr.write(f"gpu_step: {case_name(*case)} does not fit: {str(error).splitlines()[0]}\n")
            code = 1
    return code


def make_room() -> None:
    """Gives back what the case before has left: models that hang in cycles, graphs that were compiled."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Writes a result, and the page of all that lie beside it; of several processes, the first does."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{result['name']}.json").write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(write_page(options.results, options.document, result) + "\n")


if __name__ == "__main__":
    sys.exit(main())
