"""A tuned lens by this library against one by tuned-lens 0.2.0 (PyPI): seconds to a KL, KL at equal tokens, memory.

    python tests/benchmarks/tuned_lens_vs_peer.py [--model FOLDER]

Both sides fit lenses of one model on the same blocks of tokens, which the model itself has written, each in a process
of its own with the same threads and malloc settings. The peer runs its own training loop (`tuned_lens_peer.py`) in its
own venv, `.peer_venv` beside this file, made at the first call; what it pins cannot be had with the torch and
transformers of `constraints.txt`, so it is installed without dependencies, beside those that its training imports.

The peer runs at its defaults, and once more (results with `_tuned_peer`) at the best of `TUNED_PEERS`, learning rates
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
from fit_memory import FitMemory
from harness import NUM_THREADS, prepare, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from consistency_lens.data.generation import sample_documents
from consistency_lens.losses import kl_divergence
from consistency_lens.tuned_lens.fit_arguments import TunedLensTrainingArguments
from consistency_lens.tuned_lens.fitter import TunedLensFitter
from consistency_lens.tuned_lens.interchange import from_alignment_research
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens
from consistency_lens.tuned_lens.residual_batches import make_head, read_batch
from consistency_lens.tuned_lens.trainer import TunedLensTrainer

HERE = Path(__file__).parent
EMBEDDED = HERE.parents[1] / "examples" / "tiny_stories"
CONSTRAINTS = HERE.parents[1] / "constraints.txt"
PEER_VENV = HERE / ".peer_venv"
# what the peer's training imports, in the versions of today, and what it needs in its own
PEER_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "requests")
PEER_OWN_PACKAGES = ("tuned-lens==0.2.0", "torchdata==0.9.0", "simple-parsing==0.1.9", "docstring-parser==0.18.0")
HELD_OUT_BLOCKS, SEED, RUNS = 64, 0, 3


class PeerSettings(NamedTuple):
    """What the peer leaves to its user; the rest are its defaults."""

    tokens_per_step: int
    lr_scale: float

    def __str__(self) -> str:
        return f"SGD, {self.tokens_per_step} tokens a step, lr_scale {self.lr_scale:g}"


# the peer's learning rate; its 2^18 tokens a step would be a single step here
DEFAULT_PEER = PeerSettings(2048, 1)
TUNED_PEERS = [PeerSettings(*pair) for pair in ((512, 4), (1024, 4), (2048, 4))]
QUICK_TOKENS = [2**power for power in range(13, 19)]
TOKENS_PER_PASS = 1024  # of the peer's subject: larger passes took more memory and no less time


@dataclass(frozen=True)
class OurSettings:
    """How `consistency_lens` fits: ridge on the first blocks, KL steps on the rest."""

    tokens: int
    ridge_tokens: int
    blocks_per_pass: int = 8
    rows_per_step: int = 128
    learning_rate: float = 7e-3
    optimizer: str = "adamw"
    rank: int | None = None

    def __str__(self) -> str:
        rank = "full" if self.rank is None else str(self.rank)
        return (
            f"rank {rank}, ridge on {self.ridge_tokens} tokens, then {self.optimizer} at {self.learning_rate:g}, "
            f"{self.rows_per_step} positions a step, head in bfloat16"
        )


def token_blocks(
    model: PreTrainedModel, tokenizer: Any, tokens: int, held_out: int, progress: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks (N, S) int32 of the model's context, of documents that it wrote, and `held_out` others."""
    length = min(model.config.max_position_embeddings, 512)
    wanted = (tokens // length + held_out) * length
    sampled: list[int] = []
    seed = SEED
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
    head, layers = make_head(lens, "bfloat16"), range(lens.num_layers - 1)
    fitter = TunedLensFitter(lens, head)
    for rows in torch.from_numpy(ridge).long().split(settings.blocks_per_pass):
        fitter.update(read_batch(lens, head, rows, torch.arange(length).expand(len(rows), -1), layers))
    fitter.solve()
    if len(rest):
        arguments = TunedLensTrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=settings.blocks_per_pass,
            rows_per_step=settings.rows_per_step,
            head_dtype="bfloat16",
            learning_rate=settings.learning_rate,
            translator_optim=settings.optimizer,
            layers_per_step="all",
            positions_per_sequence="all",
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
    """

    def __init__(self, model: str, folder: Path, tokens: int) -> None:
        self.name, self.folder, self.tokens = model, folder, tokens
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        train, self.held_out = token_blocks(self.model, AutoTokenizer.from_pretrained(model), tokens, HELD_OUT_BLOCKS)
        self.length = train.shape[1]
        self.blocks = folder / "train.npy"
        np.save(self.blocks, train)

    def peer(self, settings: PeerSettings) -> Fit:
        """The peer's fit on all tokens."""
        output = self.folder / "peer"
        rows = max(1, min(settings.tokens_per_step, TOKENS_PER_PASS) // self.length)
        arguments = {
            "model": self.name, "blocks": self.blocks, "output": output, "threads": torch.get_num_threads(),
            "tokens_per_step": settings.tokens_per_step, "rows_per_pass": rows, "lr_scale": settings.lr_scale,
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


def best_of_peer(comparison: Comparison, candidates: list[PeerSettings]) -> PeerSettings:
    """The peer's settings with the least KL, each tried once."""
    found = {}
    for settings in candidates:
        fit = found[settings] = comparison.peer(settings)
        sys.stdout.write(f"peer, {settings}: {fit.kl:.4f} nats, {fit.seconds:.1f} s, {_mebibytes(fit):.0f} MiB\n")
    return min(found, key=lambda settings: found[settings].kl)


def quickest(comparison: Comparison, kl: float) -> OurSettings | None:
    """Our fit on the fewest tokens that reaches a KL; None if none of QUICK_TOKENS is enough."""
    for tokens in QUICK_TOKENS:
        settings = OurSettings(tokens, tokens // 4)
        fit = comparison.ours(settings)
        sys.stdout.write(f"ours, {tokens} tokens: {fit.kl:.4f} nats, {fit.seconds:.1f} s, {_mebibytes(fit):.0f} MiB\n")
        if fit.kl <= kl:
            return settings
    return None


def write_results(comparison: Comparison, peer: PeerSettings, suffix: str, device: torch.device) -> None:
    """Runs the peer and both of our fits in turn, `RUNS` times, and writes the medians.

    Args:
        suffix: of the results' names.
    """
    equal = OurSettings(comparison.tokens, comparison.tokens // 8)
    quick = quickest(comparison, comparison.peer(peer).kl)
    sides: dict[str, Any] = {"peer": peer, "equal": equal} | ({} if quick is None else {"quick": quick})
    fits: dict[str, list[Fit]] = {name: [] for name in sides}
    for _ in range(RUNS):
        for name, settings in sides.items():
            run_side = comparison.peer if name == "peer" else comparison.ours
            fits[name].append(run_side(settings))
    kl = {name: statistics.median(fit.kl for fit in runs) for name, runs in fits.items()}
    seconds = {name: statistics.median(fit.seconds for fit in runs) for name, runs in fits.items()}
    rise = {name: statistics.median(fit.memory["rise_bytes"] for fit in runs) for name, runs in fits.items()}
    config = comparison.model.config
    where = (
        f"{Path(comparison.name).name} ({config.num_hidden_layers} blocks, d={config.hidden_size}, "
        f"V={config.vocab_size}), blocks of {comparison.length} tokens; tuned-lens 0.2.0 ({peer}), "
        f"{comparison.tokens} tokens: {kl['peer']:.3f} nats"
    )
    if quick is None:
        sys.stdout.write(f"time: ours does not reach {kl['peer']:.4f} nats on {QUICK_TOKENS[-1]} tokens\n")
    else:
        what = f"fitting a lens of {where}; ours {kl['quick']:.3f} nats on {quick.tokens} tokens ({quick})"
        name = f"tuned_lens_time_to_peer_kl{suffix}"
        write_result(name, what, "seconds", seconds["quick"], seconds["peer"], RUNS, device)
    what = f"mean KL(P_final || P_layer) of held-out text after as many tokens, {where}; ours: {equal}"
    write_result(f"tuned_lens_kl_equal_tokens{suffix}", what, "nats", kl["equal"], kl["peer"], RUNS, device)
    what = f"by how much the resident set rises while a lens is fitted, {where}; ours: {equal}"
    write_result(f"tuned_lens_memory{suffix}", what, "bytes", rise["equal"], rise["peer"], RUNS, device)


def _mebibytes(fit: Fit) -> float:
    return fit.memory["rise_bytes"] / 2**20


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED), help="folder of a causal language model")
    parser.add_argument("--tokens", type=int, default=262_144)
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
        comparison = Comparison(options.model, Path(folder), options.tokens)
        write_results(comparison, DEFAULT_PEER, "", device)
        write_results(comparison, best_of_peer(comparison, TUNED_PEERS), "_tuned_peer", device)


if __name__ == "__main__":
    main()
