"""Which text a tuned lens is fitted on, and how much of it."""

from dataclasses import dataclass, field

from ..data.dataset_reading import check_source
from ..data.tokenized_corpus import is_corpus

DATASET, DATASET_CONFIG, DATASET_REVISION = "HuggingFaceFW/fineweb-edu", "CC-MAIN-2025-26", "v1.4.0"
SAMPLES = "samples"
SEQ_LEN = 512
VALIDATION_TOKENS = 65_536


@dataclass
class TokenArguments:
    """The text and the number of its tokens; what is unset is filled in when this is made."""

    dataset: str = field(
        default=DATASET,
        metadata={
            "help": "Hub id (streamed), file, folder or saved data set with a column of texts; a text file with lines "
            "of <|endoftext|> between documents; a folder that consistency-lens tokenize made; or samples: the "
            "model writes the text itself."
        },
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": f"Name of the data set's configuration; unset: {DATASET_CONFIG} of the default data set."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split that is read."})
    dataset_revision: str | None = field(
        default=None,
        metadata={
            "help": f"Commit, tag or branch of a data set on the Hub; unset: {DATASET_REVISION} of the default one."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column with the documents."})
    tokens: int = field(
        default=16_000_000, metadata={"help": "Tokens to fit on, rounded up to whole sequences of seq_len."}
    )
    seq_len: int = field(
        default=SEQ_LEN,
        metadata={"help": "Tokens of a packed sequence; the default becomes the model's context where that is less."},
    )
    bos_per_sequence: bool = field(
        default=False,
        metadata={
            "help": "Start every sequence with BOS, as the tokenizer starts a text, wherever in a document it begins; "
            "short ones are then read as prompts are, from their first token on."
        },
    )
    validation_tokens: int | None = field(
        default=None,
        metadata={
            "help": f"Tokens of held-out documents, rounded up likewise; unset: {VALIDATION_TOKENS}, or a twentieth "
            "of tokens where that is less."
        },
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the documents held out, where the dataset does not say which."}
    )

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError(f"dataset: got none; pass it, e.g. --dataset stories.txt, or --dataset {SAMPLES}")
        if self.dataset == DATASET:
            self.dataset_config = self.dataset_config or DATASET_CONFIG
            self.dataset_revision = self.dataset_revision or DATASET_REVISION
        if self.seq_len < 2:
            raise ValueError(f"seq_len must be at least 2, got {self.seq_len}; {SEQ_LEN} is a good start")
        if self.validation_tokens is None:
            self.validation_tokens = max(self.seq_len, min(VALIDATION_TOKENS, self.tokens // 20))
        for name in ("tokens", "validation_tokens"):
            if getattr(self, name) < self.seq_len:
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, less than one sequence of {self.seq_len} tokens; raise it or "
                    "lower seq_len"
                )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}; try 0.05")
        if self.is_tokenized:
            self._check_tokenized()
        else:
            check_source(self.dataset, self.dataset_config, self.dataset_revision)

    @property
    def is_sampled(self) -> bool:
        """Whether the model writes the text."""
        return self.dataset == SAMPLES

    @property
    def is_tokenized(self) -> bool:
        """Whether the text comes as tokens: as the model writes it, or from a corpus folder."""
        return self.is_sampled or is_corpus(self.dataset)

    def _check_tokenized(self) -> None:
        """Raises a ValueError for what only texts have."""
        usual = {"dataset_config": None, "dataset_split": "train", "dataset_revision": None, "text_column": "text"}
        for name, value in usual.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, but {self.dataset!r} holds no texts and has none; leave "
                    "it out"
                )
