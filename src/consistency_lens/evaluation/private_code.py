"""Do the words mean to others what they mean to the lens? Two readings that a private code does not survive.

A decoder and an encoder that are trained together may agree on a code: words that reconstruct the activation and say
something else, or nothing. Such words fail when they stand in another order, if the code is in their order, and when
an encoder reads them that learned from true text what words stand for.
"""

import copy
import random
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm

from ..data.activation_source import Rows
from ..data.collator import ActivationCollator
from ..lens_encoder import LensEncoder
from ..losses import kl_divergence, normalised_mse
from ..modeling_consistency_lens import ConsistencyLensModel
from ..schedules import Schedule
from ..straight_through import row_keys
from .controls import forked_random_state, read_ids
from .evaluated import Batch, EvaluatedRows, check_finite, judge
from .metrics import share_recovered, squared_error

# Of the fresh encoder's training; the evaluation's own batch size changes no result.
BATCH_SIZE = 64
MAX_GRADIENT_NORM = 1.0
RATE = Schedule("cosine", start=1.0, end=0.1, warmup=50)


def private_code(
    evaluated: EvaluatedRows,
    train_rows: Rows,
    collator: ActivationCollator,
    steps: int,
    learning_rate: float,
    seed: int,
    disable_tqdm: bool = True,
) -> dict[str, dict[str, float]]:
    """How much of the reconstruction is left when the lens's texts are read in another way.

    Args:
        evaluated: the held-out rows with the lens's texts.
        train_rows: rows of other documents, which the fresh encoder is trained on.
        collator: for the lens's T.
        steps, learning_rate, disable_tqdm: of `train_fresh_encoder`.
        seed: of the shuffling and of that training.

    Returns:
        Readings, each with `fve`, `kl_recovered` and `share_of_fve`, the FVE over the lens's own (0 where that is not
        positive):

        - `retokenised`: the lens's own encoder reads the texts, decoded and tokenised, which alone may change them.
        - `word_shuffle`: it reads their words in random order; its `share_of_fve` is of `retokenised`. Order carries
          meaning in true text too, so some loss is no fault.
        - `fresh_encoder`: an encoder that was trained on true text alone reads the texts as they are.
        - `fresh_encoder_on_true_text`: it reads the true ends of the contexts: how well it has learned to read.

    Raises:
        ValueError: if a reconstruction or a KL is not finite.
    """
    lens, texts = evaluated.lens, evaluated.texts()
    fresh = train_fresh_encoder(lens, train_rows, collator, steps, BATCH_SIZE, learning_rate, seed, disable_tqdm)

    def read(rows: slice, batch: Batch) -> dict[str, Tensor]:
        ids = evaluated.text_ids[rows].to(lens.device)
        keys = row_keys(seed, 0, batch["rows"].cpu()).tolist()
        shuffled = [shuffled_words(text, key) for text, key in zip(texts[rows], keys, strict=True)]
        return {
            "lens": read_ids(lens, ids),
            "retokenised": lens.encode(texts[rows]),
            "word_shuffle": lens.encode(shuffled),
            "fresh_encoder": fresh(fresh.embed_ids(ids), lens.text_mask(ids)),
            "fresh_encoder_on_true_text": fresh(fresh.embed_ids(batch["tail_ids"]), batch["tail_mask"]),
        }

    results = recovered(evaluated, read)
    own = results.pop("lens")["fve"]
    for name, of_reading in results.items():
        whole = results["retokenised"]["fve"] if name == "word_shuffle" else own
        of_reading["share_of_fve"] = of_reading["fve"] / whole if whole > 0 else 0.0
    return results


def recovered(
    evaluated: EvaluatedRows, read: Callable[[slice, Batch], dict[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """FVE and KL recovered of reconstructions.

    Args:
        evaluated: the rows.
        read: where the rows of a batch stand, and the batch -> name -> Â (B, d).

    Returns:
        name -> `fve` and `kl_recovered`.
    """
    lens = evaluated.lens
    columns: dict[str, list[Tensor]] = defaultdict(list)
    for rows, batch in evaluated:
        activations = batch["activations"]
        readings = {"mean": lens.mean.expand_as(activations)} | read(rows, batch)
        original, logits = judge(lens.subject, batch, torch.stack(list(readings.values()), dim=1))
        for index, (name, reconstruction) in enumerate(readings.items()):
            columns[f"error.{name}"].append(squared_error(activations.cpu(), reconstruction.cpu()))
            columns[f"kl.{name}"].append(kl_divergence(original[:, 0], logits[:, index]).cpu().double())
    sums = {}
    for name, values in columns.items():
        joined = torch.cat(values)
        check_finite(name, joined)
        sums[name] = joined.sum()
    return {
        name: {
            measure: float(share_recovered(sums[f"{part}.{name}"], sums[f"{part}.mean"]))
            for measure, part in (("fve", "error"), ("kl_recovered", "kl"))
        }
        for name in readings
        if name != "mean"
    }


def shuffled_words(text: str, key: int) -> str:
    """The words of a text in random order; the white space between them stays where it is."""
    words = re.findall(r"\S+", text)
    random.Random(key).shuffle(words)
    following = iter(words)
    return re.sub(r"\S+", lambda _: next(following), text)


@torch.enable_grad()
def train_fresh_encoder(
    lens: ConsistencyLensModel,
    train_rows: Rows,
    collator: ActivationCollator,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    disable_tqdm: bool = True,
) -> LensEncoder:
    """Trains an encoder to reconstruct activations from the true ends of their contexts, and from nothing else.

    It is built from the subject as the lens's encoder was, with the same settings (so where that shares the subject's
    weights, this does too), and never sees a text of the lens. The tails of a batch have one length, drawn from 1..T.

    Args:
        lens: for its settings, statistics and subject; it is left as it is.
        train_rows: rows of training documents.
        collator: for the lens's T.
        steps: of AdamW, with the gradient's norm clipped at 1.
        batch_size: rows in a step.
        learning_rate: after 50 steps of warm-up; it falls to a tenth along a cosine.
        seed: of the order of the rows and the lengths.
        disable_tqdm: no progress bar.

    Returns:
        The encoder, in evaluation mode, without gradients, on the lens's device.
    """
    with forked_random_state(lens.device):
        torch.default_generator.manual_seed(seed)  # LoRA's matrices are drawn on the CPU
        encoder = LensEncoder.from_subject(lens.subject.model, copy.deepcopy(lens.config.encoder))
    encoder.normaliser.mean.copy_(lens.mean)
    encoder.normaliser.rms.copy_(lens.rms)
    encoder = encoder.to(lens.device).eval()  # type: ignore[arg-type]
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, RATE.resolve(steps_per_epoch=None, total_steps=steps))
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, collator.num_text_tokens + 1, (steps,), generator=generator).tolist()
    batches = training_batches(train_rows, collator, steps, batch_size, generator)
    bar = tqdm(batches, total=steps, unit="step", desc="fresh encoder", disable=disable_tqdm)
    for length, batch in zip(lengths, bar, strict=True):
        ids, mask, target = (batch[name].to(lens.device) for name in ("tail_ids", "tail_mask", "activations"))
        reconstruction = encoder(encoder.embed_ids(ids[:, -length:]), mask[:, -length:])
        normalised_mse(target, reconstruction, lens.rms).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return encoder.requires_grad_(False)


def training_batches(
    rows: Any, collator: ActivationCollator, steps: int, batch_size: int, generator: torch.Generator
) -> DataLoader:
    """Batches of rows in random order, as many as steps; every row comes once before one comes again."""
    sampler = RandomSampler(rows, num_samples=steps * batch_size, generator=generator)
    return DataLoader(rows, batch_size, sampler=sampler, collate_fn=collator, generator=generator)
