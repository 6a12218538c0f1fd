"""Records of a sweep without a model: single ones, and a made-up sweep that is plausible to look at."""

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from consistency_lens.tuned_lens.records import Record

WORDS = ["<|begin|>", " The", " capital", " of", " Germany", " is", " called", " Ber", "lin", "\n", ",", " a"]
ANSWER = (11, " Berlin")


def record(**changes: Any) -> Record:
    """A record at layer 0 and position 0, of a prompt without an answer."""
    values = {
        "prompt_id": "capital", "prompt": "The capital", "lens": "norm", "layer": 0, "position": 0, "token_id": 1,
        "token": " The", "entropy_bits": 2.0, "teacher_entropy_bits": 1.0, "top20": [[1, " The", 0.75]],
        "answer": None, "answer_id": None, "answer_rank": None, "answer_probability": None, "is_answer": None,
        "kl_from_final_bits": 1.0, "kl_to_final_bits": 1.5, "cos_to_final": 0.5, "first_rank_le_10": None,
        "first_rank_le_5": None, "first_rank_le_1": None,
    }  # fmt: skip
    return Record(**(values | changes))


def write_csv(path: Path, records: list[Record]) -> None:
    """Writes records as a sweep does."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(records[0])))
        writer.writeheader()
        for of in records:
            writer.writerow(asdict(of) | {"top20": json.dumps(of.top20)})


def made_up(lens: str, layers: int = 4, tokens: int = 5, prompts: int = 3, answers: bool = True) -> list[Record]:
    """Records of every layer and position of the prompts `prompt-0`, `prompt-1`, ...; seeded. The tuned lens is
    nearer to the end, and earlier."""
    generator = np.random.default_rng(316)
    records = []
    for prompt in range(prompts):
        words = [WORDS[index % len(WORDS)] for index in range(tokens)]
        ranks = [rank_at(lens, layer, layers, prompt) for layer in range(layers)]
        for layer in range(layers):
            left = 1 - layer / max(1, layers - 1)  # 0 at the last layer
            for position in range(tokens):
                noise = generator.uniform(0.7, 1.3)
                kl = (9 * left**0.5 if lens == "norm" else 5 * left) * noise
                at_end = answers and position == tokens - 1
                records.append(
                    Record(
                        prompt_id=f"prompt-{prompt}", prompt="".join(words), lens=lens, layer=layer,
                        position=position, token_id=position, token=words[position], entropy_bits=1 + 8 * left * noise,
                        teacher_entropy_bits=1.0, top20=top20(left, layer + position, at_end and ranks[layer] == 1),
                        answer=ANSWER[1] if answers else None, answer_id=ANSWER[0] if answers else None,
                        answer_rank=ranks[layer] if at_end else None,
                        answer_probability=0.5 / ranks[layer] if at_end else None,
                        is_answer=ranks[layer] == 1 if at_end else None,
                        kl_from_final_bits=kl, kl_to_final_bits=0.8 * kl,
                        cos_to_final=math.cos(1.4 * left * (1 if lens == "norm" else 0.6) * noise),
                        **{f"first_rank_le_{rank}": first(ranks, rank) if answers else None for rank in (10, 5, 1)},
                    )
                )  # fmt: skip
    return records


def rank_at(lens: str, layer: int, layers: int, prompt: int) -> int:
    left = max(0.0, 1 - layer / max(1, layers - 1) - (0.2 if lens == "tuned" else 0.05) + 0.03 * prompt)
    return max(1, round(10 ** (4 * left)))


def first(ranks: list[int], rank: int) -> int | None:
    return next((layer for layer, found in enumerate(ranks) if found <= rank), None)


def top20(left: float, shift: int, answered: bool) -> list[list[Any]]:
    """Twenty made-up tokens, the first with most of the probability where little is left to go."""
    weights = [math.exp(-rank * (0.2 + 2 * (1 - left))) for rank in range(20)]
    words = [*WORDS[1:], *(f" word{index}" for index in range(30))]
    words = words[shift % len(words) :] + words[: shift % len(words)]
    if answered:
        words = [ANSWER[1], *words]
    return [[rank, words[rank], weight / sum(weights)] for rank, weight in enumerate(weights)]
