"""How many tokens a model reads."""

from transformers import PreTrainedConfig

# as configurations name it; that of MPT and DBRX comes last
FIELDS = ("max_position_embeddings", "max_seq_len")


def context_length(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model of this configuration reads; None where there is no limit (Bloom, Mamba)."""
    fields = config.get_text_config()
    return next((length for name in FIELDS if (length := getattr(fields, name, None))), None)
