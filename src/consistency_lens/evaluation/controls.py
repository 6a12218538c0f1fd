"""Controls: what a reconstruction is worth without the words, with other words, or without training.

A number of a lens means something only beside these. Each control but `mean` and `residual_vq` is a text that the
encoder reads in place of the decoder's (`untrained` reads its own with an encoder of its own), so that each answers
one question.
Shapes: N rows in the evaluation, B rows in a batch, T text tokens, d width.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..modeling_consistency_lens import ConsistencyLensModel
from .evaluated import Batch
from .metrics import start_token
from .residual_vq import ResidualQuantiser

# name -> what the reconstruction is made from
CONTROLS = {
    "mean": "no text, but the mean training activation",
    "shuffled": "the text of a row of another document",
    "empty_text": "a text of no tokens",
    "random_tokens": "random tokens",
    "context_tail": "the true last tokens of the context",
    "current_token_only": "the current token alone",
    "untrained": "the text of an untrained lens, by its own encoder",
    "residual_vq": "the bits of a text, not as language",
}


class Controls:
    """The reconstructions of the controls for the rows of one evaluation.

    What is random is drawn here, for all rows at once, so it does not depend on how the rows are batched.

    Args:
        lens: the lens under evaluation, in evaluation mode, with its tokenizer and subject.
        names: which controls, of `CONTROLS`.
        documents: (N,) int64, the document of each row.
        seed: of the random tokens and the shuffling.
        quantiser: for `residual_vq`, fitted to normalised activations of training rows, on the lens's device.

    Raises:
        ValueError: for a name that is no control, for `shuffled` if all rows are of one document, or for `residual_vq`
            without a quantiser.
    """

    def __init__(
        self,
        lens: ConsistencyLensModel,
        names: Sequence[str],
        documents: Tensor,
        seed: int = 0,
        quantiser: ResidualQuantiser | None = None,
    ) -> None:
        check_names("controls", names, CONTROLS)
        self.lens = lens
        generator = torch.Generator().manual_seed(seed)
        shape = (len(documents), lens.config.num_text_tokens)
        methods: dict[str, Callable[[Batch, slice, Tensor], Tensor]] = {
            "mean": self._mean,
            "shuffled": self._shuffled,
            "empty_text": self._empty_text,
            "random_tokens": self._random_tokens,
            "context_tail": self._context_tail,
            "current_token_only": self._current_token_only,
            "untrained": self._untrained,
            "residual_vq": self._residual_vq,
        }
        self.methods = {name: methods[name] for name in names}
        if "shuffled" in names:
            self.partners = rows_of_other_documents(documents, generator)
        if "random_tokens" in names:
            allowed = ordinary_tokens(lens)
            self.random_ids = allowed[torch.randint(len(allowed), shape, generator=generator)]
        if "untrained" in names:
            self.untrained = untrained_lens(lens)
        if "residual_vq" in names:
            if quantiser is None:
                raise ValueError("residual_vq control: needs a quantiser, got None; fit one to training rows")
            self.quantiser = quantiser

    @torch.no_grad()
    def reconstruct(self, batch: Batch, rows: slice, text_ids: Tensor) -> dict[str, Tensor]:
        """Name -> Â (B, d) for the rows of a batch.

        Args:
            batch: from `data.collator.ActivationCollator`, on the lens's device.
            rows: where the batch's rows stand among the N.
            text_ids: (N, T) the decoder's texts of all rows.
        """
        return {name: method(batch, rows, text_ids) for name, method in self.methods.items()}

    def _mean(self, batch: Batch, rows: slice, text_ids: Tensor) -> Tensor:
        return self.lens.mean.expand_as(batch["activations"])

    def _shuffled(self, batch: Batch, rows: slice, text_ids: Tensor) -> Tensor:
        return read_ids(self.lens, text_ids[self.partners[rows]])

    def _empty_text(self, batch: Batch, rows: slice, text_ids: Tensor) -> Tensor:
        config = self.lens.config.encoder
        ids = text_ids[:1, :0]
        if not config.prefix_ids and not config.suffix_ids:
            # Without BOS and prompt there is nothing to read at all: the nearest to nothing is the start token.
            ids = ids.new_full((1, 1), start_token(self.lens.subject.model.config.get_text_config()))
        return read_ids(self.lens, ids).expand_as(batch["activations"])

    def _random_tokens(self, batch: Batch, rows: slice, text_ids: Tensor) -> Tensor:
        return read_ids(self.lens, self.random_ids[rows])

    def _context_tail(self, batch: Batch, rows: slice, text_ids: Tensor) -> Tensor:
        return read_ids(self.lens, batch["tail_ids"], batch["tail_mask"])

    def _current_token_only(self, batch: Batch, rows: slice, text_ids: Tensor) -> Tensor:
        return read_ids(self.lens, batch["tail_ids"][:, -1:])

    def _untrained(self, batch: Batch, rows: slice, text_ids: Tensor) -> Tensor:
        return read_ids(self.untrained, self.untrained.decode_ids(batch["activations"]))

    def _residual_vq(self, batch: Batch, rows: slice, text_ids: Tensor) -> Tensor:
        normaliser = self.lens.encoder.normaliser
        return normaliser.denormalise(self.quantiser(normaliser.normalise(batch["activations"])))


def check_names(argument: str, names: Sequence[str], known: Collection[str]) -> None:
    """Checks that the names given for an argument are known ones.

    Raises:
        ValueError: if one is not.
    """
    names = [names] if isinstance(names, str) else names
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{argument}: got the unknown name {unknown[0]!r}; choose from {', '.join(known)}")


def read_ids(lens: ConsistencyLensModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the lens's encoder makes of texts (B, T), Â (B, d).

    `mask` (B, T) is false where a text is shorter; without it a text ends at the decoder's stop token, if it has one.
    """
    return lens.read_ids(ids.to(lens.device), mask)


def rows_of_other_documents(documents: Tensor, generator: torch.Generator) -> Tensor:
    """For each row a random row of another document, (N,) int64, uniform among them.

    Args:
        documents: (N,) int64.
        generator: of the draws.

    Raises:
        ValueError: if there is only one document.
    """
    order = documents.argsort(stable=True)
    _, group, sizes = documents.unique(return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise ValueError(
            f"shuffled texts: needs rows of two documents at least, got {len(documents)} rows of one; "
            "add documents, or leave `shuffled` out of `controls` and `linear_probe` out of `checks`"
        )
    # Rows of a document stand together in `order`: steps from its end, round the circle, stop before they reach it.
    fractions = torch.rand(len(documents), generator=generator, dtype=torch.float64)
    steps = (fractions * (len(documents) - sizes[group])).long()
    return order[(sizes.cumsum(0)[group] + steps) % len(documents)]


def ordinary_tokens(lens: ConsistencyLensModel) -> Tensor:
    """The token ids that are text, (n,): the tokenizer's, special ones excluded."""
    tokenizer = lens.require_tokenizer()
    special = set(tokenizer.all_special_ids)
    # A model's table may be longer than its tokenizer (padding), and the tokenizer longer than it (added tokens).
    size = min(len(tokenizer), lens.subject.model.config.get_text_config().vocab_size)
    return torch.tensor([token for token in range(size) if token not in special])


def untrained_lens(lens: ConsistencyLensModel) -> ConsistencyLensModel:
    """A fresh lens for the same subject, with the same settings and statistics."""
    config = copy.deepcopy(lens.config)
    for part in (config.decoder, config.encoder):
        # At the start all training modes give the same function (LoRA begins at zero); frozen clones share weights.
        part.training = "frozen"
    with forked_random_state(lens.device):
        fresh = ConsistencyLensModel.from_artifact_config(config, lens.subject.model, {})
    fresh.set_statistics(lens.mean, lens.rms)
    return fresh.to(lens.device).eval()  # type: ignore[arg-type]


@contextmanager
def forked_random_state(device: torch.device) -> Iterator[None]:
    """Puts the random state of the CPU and of a lens's device back afterwards.

    New layers draw their weights before they are overwritten: a training run that evaluates must not notice.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
