"""Residual vector quantisation: as many bits as a text has, without language; the yardstick beside the lens.

T codebooks of V codes each say as much as T tokens of a vocabulary of V. Each codebook is fitted to what the ones
before it left over (Juang and Gray 1982), by k-means.
Shapes: n training rows, B rows, T codebooks, C codes, d width.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

# With fewer rows for each code, the codes would be the training rows themselves.
ROWS_PER_CODE = 8
LLOYD_ITERATIONS = 4
# Distances held at a time: rows x codes.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class ResidualQuantiser:
    """T codebooks; the sum of one code of each stands for a vector.

    Codes are chosen greedily, each as the one nearest to what is left. As zero is in every codebook, one more of them
    never makes an error greater, on any vector.

    Attributes:
        codebooks: T of (C, d); the first code of each is zero.
    """

    codebooks: list[Tensor]

    @property
    def bits(self) -> float:
        """What the choice of codes can say at most."""
        return sum(math.log2(len(codes)) for codes in self.codebooks)

    def __call__(self, vectors: Tensor) -> Tensor:
        """The sums of codes (B, d) that stand for vectors (B, d)."""
        residual = vectors
        for codes in self.codebooks:
            residual = residual - codes[nearest(residual, codes)]
        return vectors - residual

    @classmethod
    def fit(
        cls, vectors: Tensor, num_codebooks: int, vocab_size: int, seed: int = 0, disable_tqdm: bool = True
    ) -> Self:
        """Fits codebooks to training vectors.

        Args:
            vectors: (n, d), centred.
            num_codebooks: T.
            vocab_size: V. There are fewer codes where n is below 8 V, so that each has rows to be the mean of: the
                bits are then fewer than those of a text, and the ceiling is too low.
            seed: of the codes that k-means starts from.
            disable_tqdm: no progress bar.
        """
        generator = torch.Generator().manual_seed(seed)
        num_codes = min(vocab_size, max(1, len(vectors) // ROWS_PER_CODE))
        residual, codebooks = vectors, []
        for _ in tqdm(range(num_codebooks), unit="codebook", desc="residual_vq", disable=disable_tqdm):
            codes = k_means(residual, num_codes, generator)
            residual = residual - codes[nearest(residual, codes)]
            codebooks.append(codes)
        return cls(codebooks)


def k_means(vectors: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Codes (C, d) by a few of Lloyd's iterations from random vectors of (n, d); the first code stays at zero."""
    codes = vectors[torch.randperm(len(vectors), generator=generator)[:num_codes].to(vectors.device)]
    codes[0] = 0
    for _ in range(LLOYD_ITERATIONS):
        chosen = nearest(vectors, codes)
        counts = torch.bincount(chosen, minlength=num_codes)
        means = torch.zeros_like(codes).index_add_(0, chosen, vectors) / counts.clamp(min=1)[:, None]
        moved = counts > 0  # a code that no vector is nearest to stays where it is
        moved[0] = False
        codes = torch.where(moved[:, None], means, codes)
    return codes


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """The index of the code (C, d) nearest to each vector (B, d), (B,) int64."""
    half_norms = codes.square().sum(dim=1) / 2
    parts = vectors.split(max(1, CHUNK_ELEMENTS // len(codes)))
    # |x - c|² / 2 without |x|², which all codes share
    return torch.cat([torch.addmm(half_norms, part, codes.T, alpha=-1).argmin(dim=1) for part in parts])
