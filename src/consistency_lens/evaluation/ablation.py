"""Ablation: which words and sentences of the lens's texts carry the reconstruction.

Each word is left out in turn, what is left is tokenised and read anew, and the drop is what the reconstruction loses.
Drops are measured from the whole text, decoded and tokenised in the same way, which alone may change its tokens.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..losses import kl_divergence
from ..modeling_consistency_lens import ConsistencyLensModel
from .evaluated import Batch, EvaluatedRows, check_finite, judge
from .metrics import share_recovered, squared_error

# A word that is listed by name must occur this often, and so many are listed.
MIN_OCCURRENCES, WORDS_LISTED = 3, 10
SENTENCE_ENDS, CLOSING_MARKS = (".", "!", "?"), "\"'”’)"


class AblatedText(NamedTuple):
    """What one text loses without each of its parts. Increases of |A - Â|² are in the square of A's units, KL in nats.

    Increases are from the whole text, re-tokenised; there are none of a text that has one part only.
    """

    variance: float
    """|A - mean|²."""
    error: float
    """|A - Â|² of the whole text, re-tokenised."""
    words: list[str]
    word_errors: list[float]
    """Increase of |A - Â|² without each word."""
    word_kls: list[float]
    """Increase of the KL without each word."""
    sentence_errors: list[float]
    sentence_kls: list[float]


@torch.no_grad()
def ablation(evaluated: EvaluatedRows, seed: int, rows: int) -> dict[str, Any]:
    """What the words and sentences of the lens's texts are worth to the reconstruction.

    A drop is the increase of |A - Â|² divided by the mean |A - mu|² of the rows: averaged over texts, it is what the
    FVE of these rows falls by. Texts of one word (or sentence) have nothing to leave out and are not counted.

    Args:
        evaluated: the rows with the lens's texts.
        seed: of the choice of rows.
        rows: at most so many are looked at.

    Returns:
        - `rows`: how many were looked at.
        - `retokenised.fve`: FVE of the whole texts after decoding and tokenising, which drops are measured from.
        - `words`: `count`, how many were left out; `mean_drop` and `mean_kl_increase` (nats) over them;
          `mean_top_drop`, of the most important word of each text; `top_share`, the sum of those over the sum of all
          words' drops, negative ones counted as none; `drop_from_end`, the mean drop of the last word, of the one
          before it, ..., and `count_from_end`, over how many; `greatest`, the ten words with the greatest mean drop
          of those that occur three times, each with `word`, `count` and `mean_drop`.
        - `sentences`: `count`, `mean_drop` and `mean_kl_increase`.

        A mean over nothing is 0, beside a count of 0.

    Raises:
        ValueError: if `rows` is below 1 or a reconstruction is not finite.
    """
    if rows < 1:
        raise ValueError(f"ablation: rows must be at least 1, got {rows}")
    texts = list(ablated_texts(evaluated, seed, rows))
    unit = fmean(text.variance for text in texts)
    errors, variances = (torch.tensor([getattr(t, name) for t in texts]) for name in ("error", "variance"))
    return {
        "rows": len(texts),
        "retokenised": {"fve": float(share_recovered(errors.sum(), variances.sum()))},
        "words": word_statistics([text for text in texts if text.word_errors], unit),
        "sentences": {
            "count": sum(len(text.sentence_errors) for text in texts),
            "mean_drop": mean_or_zero([error / unit for text in texts for error in text.sentence_errors]),
            "mean_kl_increase": mean_or_zero([kl for text in texts for kl in text.sentence_kls]),
        },
    }


@torch.no_grad()
def word_importance(lens: ConsistencyLensModel, activation: Tensor, text: str) -> list[tuple[str, float]]:
    """Each word of a text with what the FVE of one activation loses if the word is left out.

    Args:
        lens: in evaluation mode, with its tokenizer.
        activation: A, (d,).
        text: words for it, such as `lens.decode(activation).texts[0]`.

    Returns:
        The words in their order, white space and all else as it stands around them left off, each with
        (|A - Â without it|² - |A - Â|²) / |A - mean|²; negative where the text is better without the word.

    Raises:
        ValueError: if the text has fewer than two words.
    """
    words = split_words(text)
    if len(words) < 2:
        raise ValueError(f"word_importance: the text must have at least two words, got {text!r}")
    reconstructions = lens.encode([text, *without_each(words)]).cpu()
    activation = activation.cpu()
    whole, *rest = (squared_error(activation, reconstructions) / squared_error(activation, lens.mean.cpu())).tolist()
    return [(word.strip(), error - whole) for word, error in zip(words, rest, strict=True)]


def ablated_texts(evaluated: EvaluatedRows, seed: int, rows: int) -> Iterator[AblatedText]:
    """At most `rows` rows, chosen at random, one after the other."""
    texts = evaluated.texts()
    chosen = torch.zeros(len(texts), dtype=torch.bool)
    chosen[torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:rows]] = True
    for places, batch in evaluated:
        for index in chosen[places].nonzero().flatten().tolist():
            row = {name: tensor[index : index + 1] for name, tensor in batch.items()}
            yield ablated_text(evaluated.lens, row, texts[places.start + index])


def ablated_text(lens: ConsistencyLensModel, row: Batch, text: str) -> AblatedText:
    """Leaves out each word and each sentence of the text of one row (a batch of one)."""
    words, sentences = split_words(text), split_sentences(text)
    word_rests, sentence_rests = without_each(words), without_each(sentences)
    reconstructions = lens.encode([text, *word_rests, *sentence_rests])
    original, logits = judge(lens.subject, row, reconstructions[None])
    activation = row["activations"][0].cpu()
    errors = squared_error(activation, reconstructions.cpu())
    kls = kl_divergence(original.expand_as(logits), logits)[0].cpu().double()
    check_finite("the errors without a word", errors)
    check_finite("the KL without a word", kls)
    sizes = [1, len(word_rests), len(sentence_rests)]
    _, word_errors, sentence_errors = (part.tolist() for part in (errors - errors[0]).split(sizes))
    _, word_kls, sentence_kls = (part.tolist() for part in (kls - kls[0]).split(sizes))
    return AblatedText(
        variance=float(squared_error(activation, lens.mean.cpu())),
        error=float(errors[0]),
        words=[word.strip() for word in words],
        word_errors=word_errors,
        word_kls=word_kls,
        sentence_errors=sentence_errors,
        sentence_kls=sentence_kls,
    )


def split_words(text: str) -> list[str]:
    """The words of a text, split at white space; each keeps the space before it, so that joined they are the text."""
    return re.findall(r"\s*\S+(?:\s+\Z)?", text)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each up to a word that ends in `.`, `!` or `?`; joined they are the text."""
    sentences: list[str] = []
    ended = True
    for word in split_words(text):
        if ended:
            sentences.append(word)
        else:
            sentences[-1] += word
        ended = word.rstrip().rstrip(CLOSING_MARKS).endswith(SENTENCE_ENDS)
    return sentences


def without_each(parts: Sequence[str]) -> list[str]:
    """The text without each part in turn, beginning with the white space it began with; nothing for a single part."""
    if len(parts) < 2:
        return []
    start = parts[0][: len(parts[0]) - len(parts[0].lstrip())]
    rests = ("".join(part for other, part in enumerate(parts) if other != index) for index in range(len(parts)))
    return [start + rest.lstrip() for rest in rests]


def word_statistics(texts: Sequence[AblatedText], unit: float) -> dict[str, Any]:
    """The part `words` of `ablation`, of texts of two words at least."""
    drops = [[error / unit for error in text.word_errors] for text in texts]
    top = [max(of_text) for of_text in drops]
    gains = sum(max(drop, 0.0) for of_text in drops for drop in of_text)
    columns = [
        [drop for drop in column if drop is not None] for column in zip_longest(*(of_text[::-1] for of_text in drops))
    ]
    of_word: dict[str, list[float]] = defaultdict(list)
    for text, of_text in zip(texts, drops, strict=True):
        for word, drop in zip(text.words, of_text, strict=True):
            of_word[word].append(drop)
    frequent = {word: fmean(values) for word, values in of_word.items() if len(values) >= MIN_OCCURRENCES}
    greatest = sorted(frequent, key=lambda word: frequent[word], reverse=True)[:WORDS_LISTED]
    return {
        "count": sum(len(of_text) for of_text in drops),
        "mean_drop": mean_or_zero([drop for of_text in drops for drop in of_text]),
        "mean_kl_increase": mean_or_zero([kl for text in texts for kl in text.word_kls]),
        "mean_top_drop": mean_or_zero(top),
        "top_share": sum(max(drop, 0.0) for drop in top) / gains if gains > 0 else 0.0,
        "drop_from_end": [fmean(column) for column in columns],
        "count_from_end": [len(column) for column in columns],
        "greatest": [{"word": word, "count": len(of_word[word]), "mean_drop": frequent[word]} for word in greatest],
    }


def mean_or_zero(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0
