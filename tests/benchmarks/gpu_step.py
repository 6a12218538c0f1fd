"""A training step on GPUs: a Llama of about 1B parameters with random weights, each objective, eager and compiled.

    python tests/benchmarks/gpu_step.py
    torchrun --nproc_per_node 8 tests/benchmarks/gpu_step.py
    accelerate launch --config_file examples/accelerate/fsdp2.yaml tests/benchmarks/gpu_step.py --modes eager

Writes `results/gpu/<name>.json`, and `docs/gpu.md` from all of them. `--tiny FOLDER` goes the same way with a tiny
model on the CPU and writes there, so that the script can be tested without a GPU; what it measures then means nothing.

MFU is FLOPs of a step / (seconds of the step x the device's dense bfloat16 peak). The FLOPs are those of the matrix
products that the step really makes, 2 m n k each: forward and backward passes of decoder and encoder, rollouts, the
subject's and the reference's passes, the products of the straight-through gradient. torch's FlopCounterMode counts
them on one eager step; a compiled step does the same work and is given the same count.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import RESULTS, machine
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

DOCUMENT = Path(__file__).parents[2] / "docs" / "gpu.md"
OBJECTIVES, MODES = ("warm_start", "gumbel", "policy_gradient"), ("eager", "compile")
ONE_BILLION = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
}  # fmt: skip
TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
# Dense bfloat16 FLOPs a second, as the makers state them; the longest name that a device's begins with counts.
PEAKS = {
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12, "NVIDIA B200": 2250e12, "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12,
}  # fmt: skip
COLUMNS = ("objective", "mode", "strategy", "processes", "step, s", "texts/s", "tokens/s", "peak, GB", "TFLOPs", "MFU")


class Rows(torch.utils.data.Dataset):
    """Random contexts of one length, each with a random activation at its last token."""

    def __init__(self, count: int, length: int, width: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.contexts = torch.randint(3, vocabulary, (count, length), generator=generator).int().numpy()
        self.activations = torch.randn(count, width, generator=generator).numpy()

    def __len__(self) -> int:
        return len(self.contexts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = self.contexts.shape[1] - 1
        known = {"position": position, "document": index, "row": index}
        return {"activation": self.activations[index], "input_ids": self.contexts[index], **known}


class Timer(TrainerCallback):
    """Seconds of each step after `warmup` others, the memory that they took at most, and the FLOPs of the first."""

    def __init__(self, device: torch.device, warmup: int, count_flops: bool) -> None:
        self.device, self.warmup = device, warmup
        self.counter = FlopCounterMode(display=False) if count_flops else None
        self.seconds: list[float] = []
        self.flops: int | None = None

    def now(self) -> float:
        """The time when the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0 and self.counter is not None:
            self.counter.__enter__()
        if state.global_step == self.warmup and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.since = self.now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        elapsed = self.now() - self.since
        if state.global_step == 1 and self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.flops = self.counter.get_total_flops()
        if state.global_step > self.warmup:
            self.seconds.append(elapsed)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one word per token: only its BOS is of use here."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, min(vocabulary, 97))}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_lens(options: argparse.Namespace, device: torch.device) -> Any:
    """The lens over a subject with random weights in bfloat16, its clones with adapters where PEFT is installed."""
    from consistency_lens import ConsistencyLensModel

    torch.manual_seed(0)
    config = LlamaConfig(**options.sizes, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with torch.device(device):
        subject = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    adapters = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    lens = ConsistencyLensModel.from_subject(
        subject,
        word_tokenizer(config.vocab_size),
        config.num_hidden_layers // 2,
        num_text_tokens=options.num_text_tokens,
        training=options.clones,
        lora=adapters if options.clones == "lora" else None,
    )
    lens.set_statistics(torch.zeros(config.hidden_size), 1.0)
    return lens


def measure(options: argparse.Namespace, objective: str, mode: str) -> tuple[Timer, Any]:
    """Trains for a few steps; returns what was timed and the trainer's arguments."""
    from consistency_lens.data.collator import ActivationCollator
    from consistency_lens.training.arguments import ConsistencyLensTrainingArguments
    from consistency_lens.training.trainer import ConsistencyLensTrainer

    args = ConsistencyLensTrainingArguments(
        output_dir=str(options.results / "run"), stages=[objective], max_steps=options.warmup + options.steps,
        per_device_train_batch_size=options.batch, learning_rate=1e-4, bf16=True, use_cpu=options.tiny is not None,
        torch_compile=mode == "compile", lm_reference="subject", straight_through=True, group_size=4,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    lens = make_lens(options, args.device)
    sizes = options.sizes
    rows = Rows(options.batch * args.world_size * 2, options.length, sizes["hidden_size"], sizes["vocab_size"])
    timer = Timer(args.device, options.warmup, count_flops=mode == "eager")
    ConsistencyLensTrainer(
        model=lens,
        args=args,
        train_dataset=rows,
        data_collator=ActivationCollator(0, options.num_text_tokens, bos_token_id=1),
        callbacks=[timer],
    ).train()
    return timer, args


def result_of(options: argparse.Namespace, objective: str, mode: str, flops: int | None) -> dict[str, Any]:
    """Measures one case. `flops` of a process's step are those of the eager one, where this is not it."""
    from consistency_lens.training.callbacks import peak_memory_bytes
    from consistency_lens.training.dry_run import launched_strategy

    timer, args = measure(options, objective, mode)
    seconds, flops = statistics.median(timer.seconds), timer.flops or flops
    texts = options.batch * (4 if objective == "policy_gradient" else 1) * args.world_size
    read = options.batch * args.world_size * options.length if objective == "gumbel" else 0
    peak, strategy = peak_of(args.device), launched_strategy(args.world_size)
    return {
        "name": f"gpu_step_{objective}_{mode}_{strategy.replace(' ', '_')}_{args.world_size}",
        "what": f"one {objective} step of a lens of T={options.num_text_tokens} over a Llama, {options.clones} clones",
        "unit": "seconds",
        "seconds": seconds,
        "all_seconds": timer.seconds,
        "texts_per_second": texts / seconds,
        "tokens_per_second": (texts * options.num_text_tokens + read) / seconds,
        "peak_memory_bytes": peak_memory_bytes(args.device),
        "flops": flops,
        "mfu": None if peak is None or flops is None else flops / seconds / peak,
        "runs": len(timer.seconds),
        "settings": {
            "objective": objective, "mode": mode, "strategy": strategy, "processes": args.world_size,
            "batch": options.batch, "T": options.num_text_tokens, "S": options.length, "clones": options.clones,
            "subject": options.sizes,
        },
        "machine": machine(args.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }  # fmt: skip


def peak_of(device: torch.device) -> float | None:
    """Dense bfloat16 FLOPs a second of a device; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [start for start in PEAKS if name.startswith(start)]
    return PEAKS[max(known, key=len)] if known else None


def document(results: list[dict[str, Any]]) -> str:
    """The page of all results, a table for each device and its versions."""
    parts = ["# A training step on GPUs", "Written by `tests/benchmarks/gpu_step.py` from what it measured."]
    places = {json.dumps([result["machine"], result["versions"]]): result for result in results}
    for place, first in places.items():
        versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        parts += [f"## {first['machine']['device']}", f"{versions}."]
        here = [result for result in results if json.dumps([result["machine"], result["versions"]]) == place]
        settings = here[0]["settings"]
        parts.append(
            f"Random weights, {settings['subject']['num_hidden_layers']} blocks of width "
            f"{settings['subject']['hidden_size']}, vocabulary {settings['subject']['vocab_size']:,}; clones: "
            f"{settings['clones']}; T={settings['T']}, {settings['batch']} activations a process, contexts of "
            f"S={settings['S']} tokens, bfloat16 autocast; four texts an activation under policy gradient. Medians."
        )
        rows = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(['---'] * len(COLUMNS))} |"]
        parts.append("\n".join(rows + [table_row(result) for result in here]))
    parts.append(
        "Tokens are those of the texts, and of the contexts where the subject judges. TFLOPs: of the matrix products "
        "of a process's step, 2 m n k each, forward, backward, rollouts, subject and reference alike, counted on an "
        "eager step. MFU: these over the step's seconds times the device's dense bfloat16 peak."
    )
    return "\n\n".join(parts) + "\n"


def table_row(result: dict[str, Any]) -> str:
    """One case as a line of a Markdown table."""
    settings, mfu, flops = result["settings"], result["mfu"], result["flops"]
    cells = [settings[name] for name in ("objective", "mode", "strategy", "processes")]
    cells += [f"{result['seconds']:.3g}", f"{result['texts_per_second']:,.0f}", f"{result['tokens_per_second']:,.0f}"]
    cells += [f"{result['peak_memory_bytes'] / 1e9:.1f}", "" if flops is None else f"{flops / 1e12:.3g}"]
    cells.append("not known" if mfu is None else f"{mfu:.1%}")
    return f"| {' | '.join(map(str, cells))} |"


def clones_here() -> str:
    """How the clones are trained: with adapters, but frozen where PEFT is not installed."""
    return "lora" if importlib.util.find_spec("peft") else "frozen"


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """Flags, and what follows from them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", type=Path, metavar="FOLDER", help="a tiny model on the CPU; results go there")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--batch", type=int, default=64, help="activations a process")
    options = parser.parse_args(argv)
    is_tiny = options.tiny is not None
    options.sizes = TINY if is_tiny else ONE_BILLION
    options.num_text_tokens, options.length = (3, 16) if is_tiny else (16, 256)
    options.clones = clones_here()
    options.results = options.tiny / "results" if is_tiny else RESULTS / "gpu"
    options.document = options.tiny / "gpu.md" if is_tiny else DOCUMENT
    return options


def main(argv: list[str] | None = None) -> int:
    """Measures every case and writes it. Returns the exit code: 2 where nothing can be measured."""
    options = read_options(argv)
    if options.tiny is None and not torch.cuda.is_available():
        sys.stderr.write("gpu_step: there is no GPU here; --tiny FOLDER tries the script itself on a tiny model\n")
        return 2
    try:
        import consistency_lens.training.trainer  # noqa: F401
    except ImportError as error:
        sys.stderr.write(f"gpu_step: {error}; install the package on this machine: pip install -e '.[lora]'\n")
        return 2
    if options.clones != "lora":
        sys.stdout.write("gpu_step: PEFT is not installed, so the clones are frozen; pip install peft for adapters\n")
    for objective in options.objectives:
        flops = None
        for mode in options.modes:
            result = result_of(options, objective, mode, flops)
            flops = result["flops"]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                write(options, result)
    return 0


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Writes a result, and the page of all that lie beside it."""
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{result['name']}.json").write_text(json.dumps(result, indent=2) + "\n")
    results = [json.loads(path.read_text()) for path in sorted(options.results.glob("gpu_step_*.json"))]
    options.document.parent.mkdir(parents=True, exist_ok=True)
    options.document.write_text(document(results), encoding="utf-8")
    sys.stdout.write(table_row(result) + "\n")


if __name__ == "__main__":
    sys.exit(main())
