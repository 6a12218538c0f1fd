"""A tuned lens by this library against one by tuned-lens 0.2.0 (PyPI): seconds to a KL, KL at equal tokens, memory.

    python tests/benchmarks/tuned_lens_vs_peer.py [--model FOLDER]

Without `--model` it is the embedded model, whose results are called `..._embedded`: there the peer comes as close as
any affine lens can, so little is left to tell the two apart. docs/tuned_lens.md says how the larger model is made.

Both sides fit lenses of one model on the same blocks of tokens, which the model itself has written, each in a process
of its own with the same threads and malloc settings. The peer runs its own training loop (`tuned_lens_peer.py`) in its
own venv, `.peer_venv` beside this file, made at the first call; what it pins cannot be had with the torch and
transformers of `constraints.txt`, so it is installed without dependencies, beside those that its training imports.

The peer runs at its defaults (in float32 where the CPU has no instructions for bfloat16, which spares it much time),
and once more (results with `_tuned_peer`) at the best of `TUNED_PEERS`, learning rates
and steps that are chosen for it by the very text that judges. Its default of 2^18 tokens a step would be a single step
of such a fit.

One evaluation judges both: mean KL(P_final || P_layer) in nats over all layers but the last, and all positions of
held-out blocks; the peer's lens is read by `from_alignment_research` for that. Seconds are those of fitting alone,
without imports, loading and evaluation; memory is by how much the resident set rises from the moment when model and
tokens are there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from fit_memory import FitMemory
from harness import NUM_THREADS, prepare, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from consistency_lens.data.generation import sample_documents
from consistency_lens.losses import kl_divergence
from consistency_lens.tuned_lens.fit_arguments import TunedLensTrainingArguments
from consistency_lens.tuned_lens.fitter import TunedLensFitter
from consistency_lens.tuned_lens.interchange import from_alignment_research
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.residual_batches import has_fast_bfloat16, make_head, read_residuals
from consistency_lens.tuned_lens.trainer import TunedLensTrainer

HERE = Path(__file__).parent
EMBEDDED = HERE.parents[1] / "examples" / "tiny_stories"
CONSTRAINTS = HERE.parents[1] / "constraints.txt"
PEER_VENV = HERE / ".peer_venv"
# what the peer's training imports, in the versions of today, and what it needs in its own
PEER_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "requests")
PEER_OWN_PACKAGES = ("tuned-lens==0.2.0", "torchdata==0.9.0", "simple-parsing==0.1.9", "docstring-parser==0.18.0")
HELD_OUT_BLOCKS, SEED, RUNS = 32, 0, 3
EMBEDDED_SUFFIX = "_embedded"  # of its results


class PeerSettings(NamedTuple):
    """What the peer leaves to its user; the rest are its defaults."""

    tokens_per_step: int
    lr_scale: float

    def __str__(self) -> str:
        return f"SGD, {self.tokens_per_step} tokens a step, lr_scale {self.lr_scale:g}"


# the peer's learning rate; its 2^18 tokens a step would be a single step here
DEFAULT_PEER = PeerSettings(2048, 1)
TUNED_PEERS = [PeerSettings(*pair) for pair in ((512, 4), (1024, 4), (2048, 4))]
TOKENS_PER_PASS = 1024  # of the peer's subject: larger passes took more memory and no less time


@dataclass(frozen=True)
class OurSettings:
    """How `consistency_lens` fits: ridge on the first blocks, KL steps on the rest."""

    tokens: int
    ridge_tokens: int
    blocks_per_pass: int = 4
    positions: int | None = None
    rows_per_step: int = 128
    learning_rate: float = 2e-3
    optimizer: str = "adamw"
    rank: int | None = None

    def __str__(self) -> str:
        rank = "full" if self.rank is None else str(self.rank)
        start = f"rank {rank}, ridge on {self.ridge_tokens} tokens"
        if self.ridge_tokens == self.tokens:
            return f"{start}, no KL steps"
        positions = "all" if self.positions is None else str(self.positions)
        return (
            f"{start}, then {self.optimizer} at {self.learning_rate:g}, {positions} positions of a block, "
            f"{self.rows_per_step} positions a step"
        )


# the shortest fit first
QUICK_TOKENS = [tokens for power in range(12, 19) for tokens in (2**power, 3 * 2 ** (power - 1))]
QUICK_SETTINGS = [OurSettings(tokens, tokens // 2) for tokens in QUICK_TOKENS]


def equal_settings(tokens: int) -> OurSettings:
    """Our fit on as many tokens as the peer's, at half of the positions."""
    return OurSettings(tokens, tokens // 8, positions=128, rows_per_step=256, learning_rate=3e-3)


def token_blocks(
    model: PreTrainedModel, tokenizer: Any, tokens: int, held_out: int, seed: int = SEED, progress: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks (N, S) int32 of the model's context, of documents that it wrote, and `held_out` others."""
    length = min(model.config.max_position_embeddings, 512)
    wanted = (tokens // length + held_out) * length
    sampled: list[int] = []
    while len(sampled) < wanted:
        count = max(16, (wanted - len(sampled)) // length + 16)
        documents = sample_documents(model, tokenizer, count, length, seed=seed, batch_size=128, progress=progress)
        sampled += [token for document in documents["input_ids"] for token in document]
        seed += 1
    blocks = np.array(sampled[:wanted], dtype=np.int32).reshape(-1, length)
    return blocks[:-held_out], blocks[-held_out:]


@torch.no_grad()
def mean_kl(lens: TunedLens, blocks: np.ndarray, rows: int = 8) -> float:
    """Mean KL(P_final || P_layer) in nats over all layers but the last and all positions of the blocks (N, S)."""
    layers, total = lens.num_layers - 1, 0.0
    for part in torch.from_numpy(blocks).long().split(rows):
        residuals = lens.residuals(part)
        final = lens.logits(layers, residuals[-1])
        total += sum(kl_divergence(final, lens.logits(k, residuals[k])).sum().item() for k in range(layers))
    return total / (layers * blocks.size)


def fit_ours(model: PreTrainedModel, blocks: np.ndarray, settings: OurSettings, folder: Path) -> TunedLens:
    """Our fit, on the blocks that its tokens come to, each of which goes through the subject once."""
    length = blocks.shape[1]
    ridge, rest = np.split(blocks[: settings.tokens // length], [settings.ridge_tokens // length])
    lens = TunedLens.for_model(model, rank=settings.rank)
    head, layers = make_head(lens), range(lens.num_layers - 1)
    fitter = TunedLensFitter(lens, head)
    for rows in torch.from_numpy(ridge).long().split(settings.blocks_per_pass):
        fitter.update(read_residuals(lens, rows, torch.arange(length).expand(len(rows), -1), layers))
    fitter.solve()
    if len(rest):
        arguments = TunedLensTrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=settings.blocks_per_pass,
            rows_per_step=settings.rows_per_step,
            learning_rate=settings.learning_rate,
            translator_optim=settings.optimizer,
            layers_per_step="all",
            positions_per_sequence="all" if settings.positions is None else str(settings.positions),
            position_range=[0.0, 1.0],
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            early_stopping_patience=0,
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
        )
        TunedLensTrainer(lens, arguments, rest, rest[:1]).train()
    return lens


def measure_ours(options: argparse.Namespace) -> None:
    """Our side, in a process of its own: writes the lens and result.json."""
    settings = OurSettings(**json.loads(options.ours))
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    blocks = np.load(options.blocks)
    folder = Path(options.output)
    Accelerator(cpu=True)  # imports what it finds installed, such as deepspeed
    memory, start = FitMemory(), time.perf_counter()
    lens = fit_ours(model, blocks, settings, folder)
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "tokens": settings.tokens, "memory": memory.as_dict()}
    lens.save_pretrained(folder)
    (folder / "result.json").write_text(json.dumps(result) + "\n")


class Fit(NamedTuple):
    """One run of a side."""

    seconds: float
    memory: dict[str, int]
    kl: float
    """Held-out, in nats."""


class Comparison:
    """Both sides on one model and one text.

    Args:
        model: folder of the subject.
        folder: for the tokens and lenses.
        tokens: of the longest fit.
        seed: of the text.
        made_by: how the subject was made, for the results.
    """

    def __init__(self, model: str, folder: Path, tokens: int, seed: int = SEED, made_by: str | None = None) -> None:
        self.name, self.folder, self.tokens = model, folder, tokens
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        train, self.held_out = token_blocks(self.model, tokenizer, tokens, HELD_OUT_BLOCKS, seed)
        self.length = train.shape[1]
        self.blocks = folder / "train.npy"
        np.save(self.blocks, train)
        config = self.model.config
        made = "" if made_by is None else f"made by {made_by}; "
        self.description = (
            f"{Path(model).name} ({made}{config.num_hidden_layers} blocks, d={config.hidden_size}, "
            f"V={config.vocab_size}), blocks of {self.length} tokens of its own text"
        )

    def peer(self, settings: PeerSettings) -> Fit:
        """The peer's fit on all tokens."""
        output = self.folder / "peer"
        rows = max(1, min(settings.tokens_per_step, TOKENS_PER_PASS) // self.length)
        arguments = {
            "model": self.name, "blocks": self.blocks, "output": output, "threads": torch.get_num_threads(),
            "tokens_per_step": settings.tokens_per_step, "rows_per_pass": rows, "lr_scale": settings.lr_scale,
            "autocast": str(has_fast_bfloat16(torch.device("cpu"))).lower(),
        }  # fmt: skip
        flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
        run([str(PEER_VENV / "bin" / "python"), "-W", "ignore", str(HERE / "tuned_lens_peer.py"), *flags])
        return self.read(output, from_alignment_research(output, self.model))

    def ours(self, settings: OurSettings) -> Fit:
        """Our fit."""
        output = self.folder / "ours"
        flags = ["--model", self.name, "--blocks", str(self.blocks), "--output", str(output)]
        run([sys.executable, __file__, *flags, "--ours", json.dumps(asdict(settings))])
        return self.read(output, TunedLens.from_pretrained(output, base_model=self.model))

    def read(self, output: Path, lens: TunedLens) -> Fit:
        result = json.loads((output / "result.json").read_text())
        return Fit(result["seconds"], result["memory"], mean_kl(lens, self.held_out))


def run(command: list[str]) -> None:
    """Runs a side; what it says is shown if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[1]} failed:\n{done.stderr[-4000:]}")


def make_peer_venv() -> None:
    """Makes the peer's venv where there is none."""
    if (PEER_VENV / "ready").is_file():
        return
    run([sys.executable, "-m", "venv", "--clear", str(PEER_VENV)])
    pip = [str(PEER_VENV / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    run([*pip, "-c", str(CONSTRAINTS), *PEER_PACKAGES])
    run([*pip, "--no-deps", *PEER_OWN_PACKAGES])
    (PEER_VENV / "ready").touch()


def best_of_peer(comparison: Comparison, candidates: list[PeerSettings]) -> tuple[PeerSettings, Fit]:
    """The peer's settings with the least KL, each tried once, and that fit."""
    found = {settings: comparison.peer(settings) for settings in candidates}
    for settings, fit in found.items():
        say(f"peer, {settings}", fit)
    best = min(found, key=lambda settings: found[settings].kl)
    return best, found[best]


def quickest(comparison: Comparison, kl: float) -> tuple[OurSettings, Fit] | None:
    """The first of our QUICK_SETTINGS that reaches a KL, and that fit; None if none does."""
    for settings in QUICK_SETTINGS:
        if settings.tokens > comparison.tokens:
            break
        fit = comparison.ours(settings)
        say(f"ours, {settings.tokens} tokens", fit)
        if fit.kl <= kl:
            return settings, fit
    return None


def measure(
    comparison: Comparison, peer: PeerSettings, first: Fit | None, runs: int
) -> dict[str, tuple[Any, list[Fit]]]:
    """The settings of each side and its fits, one after the other in turn, so many times.

    Args:
        first: the peer's first fit, where there is one already.
    """
    first = comparison.peer(peer) if first is None else first
    sides: dict[str, tuple[Any, list[Fit]]] = {"peer": (peer, [first])}
    quick = quickest(comparison, first.kl)
    if quick is not None:
        sides["quick"] = (quick[0], [quick[1]])
    equal = equal_settings(comparison.tokens)
    sides["equal"] = (equal, [comparison.ours(equal)])
    for _ in range(runs - 1):
        for name, (settings, fits) in sides.items():
            fits.append(comparison.peer(settings) if name == "peer" else comparison.ours(settings))
            say(name, fits[-1])
    return sides


def write_results(
    comparison: Comparison,
    peer: PeerSettings,
    suffix: str,
    device: torch.device,
    first: Fit | None = None,
    runs: int = RUNS,
) -> None:
    """Runs the peer and both of our fits, and writes the medians.

    Args:
        suffix: of the results' names.
        first, runs: see `measure`.
    """
    sides = measure(comparison, peer, first, runs)
    kl, seconds, rise = (
        {name: statistics.median(figure(fit) for fit in fits) for name, (_, fits) in sides.items()}
        for figure in (lambda fit: fit.kl, lambda fit: fit.seconds, lambda fit: fit.memory["rise_bytes"])
    )
    where = f"{comparison.description}; tuned-lens 0.2.0 ({peer}), {comparison.tokens} tokens: {kl['peer']:.3f} nats"
    equal = sides["equal"][0]
    if "quick" not in sides:
        sys.stdout.write(f"time: ours does not reach {kl['peer']:.4f} nats\n")
    else:
        quick = sides["quick"][0]
        what = f"fitting a lens of {where}; ours {kl['quick']:.3f} nats on {quick.tokens} tokens ({quick})"
        name = f"tuned_lens_time_to_peer_kl{suffix}"
        write_result(name, what, "seconds", seconds["quick"], seconds["peer"], runs, device)
    what = f"mean KL(P_final || P_layer) of held-out text after as many tokens, {where}; ours: {equal}"
    write_result(f"tuned_lens_kl_equal_tokens{suffix}", what, "nats", kl["equal"], kl["peer"], runs, device)
    what = f"by how much the resident set rises while a lens is fitted, {where}; ours: {equal}"
    write_result(f"tuned_lens_memory{suffix}", what, "bytes", rise["equal"], rise["peer"], runs, device)


def say(name: str, fit: Fit) -> None:
    """Tells of one fit."""
    mebibytes = fit.memory["rise_bytes"] / 2**20
    sys.stdout.write(f"{name}: {fit.kl:.4f} nats, {fit.seconds:.1f} s, {mebibytes:.0f} MiB\n")
    sys.stdout.flush()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED), help="folder of a causal language model")
    parser.add_argument("--made_by", help="how that model was made, for the results")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--tuned_runs", type=int, default=RUNS, help="of each side beside the tuned peer; 0: none")
    parser.add_argument("--seed", type=int, default=SEED, help="of the text")
    parser.add_argument("--ours", help=argparse.SUPPRESS)  # settings of one fit, in a process of its own
    parser.add_argument("--blocks", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    """Finds the peer's best settings, measures both sides and writes the results."""
    device = prepare()
    torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", NUM_THREADS)))
    options = parse(sys.argv[1:])
    if options.ours is not None:
        measure_ours(options)
        return
    make_peer_venv()
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(options.model, Path(folder), options.tokens, options.seed, options.made_by)
        suffix = EMBEDDED_SUFFIX if Path(options.model).resolve() == EMBEDDED else ""
        write_results(comparison, DEFAULT_PEER, suffix, device)
        if options.tuned_runs:
            best, first = best_of_peer(comparison, TUNED_PEERS)
            write_results(comparison, best, f"{suffix}_tuned_peer", device, first, options.tuned_runs)


if __name__ == "__main__":
    main()
