"""Rows that are read at chosen positions of a few sequences, and what a subject makes of them."""

import numpy as np
import torch
from tiny_models import VOCAB_SIZE, tiny_model

from consistency_lens.data.collator import ActivationCollator
from consistency_lens.data.on_the_fly import read_activations
from consistency_lens.evaluation.evaluated import judge
from consistency_lens.subject import Subject
from consistency_lens.training.objectives import functional_kl

LAYER, LENGTH = 1, 20


def rows_of(*positions, seed=0):
    """Rows read at these positions of some sequences, one tuple of positions a sequence."""
    generator = np.random.default_rng(seed)
    rows = []
    for document, read in enumerate(positions):
        tokens = generator.integers(3, VOCAB_SIZE, LENGTH).astype(np.int32)
        for position in read:
            known = {"position": position, "document": document, "row": len(rows)}
            rows.append({"input_ids": tokens[: position + 1], **known})
    return [rows[i] for i in generator.permutation(len(rows))]


def collated(rows):
    return ActivationCollator(0, 3)(rows)


def subject_of(family, **settings):
    """A tiny subject; gemma3 has blocks with a window that is shorter than the sequences."""
    return Subject(tiny_model(family, **({"sliding_window": 8} if family == "gemma3" else {})), LAYER, **settings)


def judged(subject, batch, with_context):
    """Activations, the KL of others in their place and its gradient, and the predictions with both."""
    read = read_activations(subject, batch, keep_context=with_context)
    assert ("context" in read) == with_context
    noise = torch.randn(read["activations"].shape, generator=torch.Generator().manual_seed(1))
    replaced = (read["activations"] + noise).requires_grad_()
    kl = functional_kl(subject, read, replaced[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(kl.sum(), replaced)
    both = torch.stack([read["activations"], replaced.detach()], dim=1)
    return read["activations"], kl, gradient, *judge(subject, batch, both)


def assert_same(found, expected):
    """Two results of `judged`, whose KLs are none of them near zero."""
    assert expected[1].min() > 1e-2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
