"""Whether the subject that a saved lens was loaded with is known to be its own, the one that it was made for.

Another model of the architecture passes where weights cannot be compared: those that were loaded in another precision,
or a lens that has no record of them. What it gives may be shown, but has no place among the files of the lens.
"""

from transformers import PreTrainedModel

from .artifact_subject import precision, why_not_compared
from .lens_artifact import TrainedTensorsModel, recorded_weights_hash


class UnknownSubjectError(ValueError):
    """The subject of a lens may be another model than it was made for."""


def is_known(lens: TrainedTensorsModel, subject: PreTrainedModel, by_commit: bool) -> bool:
    """Whether a subject that was let through when it was loaded is the lens's own.

    Args:
        lens: that was loaded with it, without `verify_base=False`.
        by_commit: it was loaded at the commit that the lens pins.
    """
    is_compared = recorded_weights_hash(lens.provenance) and not why_not_compared(lens.config.base_config, subject)
    return by_commit or bool(is_compared)


def check_known(
    lens: TrainedTensorsModel, subject: PreTrainedModel, by_commit: bool, is_named: bool, otherwise: str | None = None
) -> None:
    """Checks that what a lens's subject gives may be written into the folder of the lens; before that is worked out.

    A lens without a record of the weights is believed of the place that it names itself.

    Args:
        lens, subject, by_commit: see `is_known`.
        is_named: the user has said where the subject is, and not the lens.
        otherwise: what the user may do but to load the lens's own subject so that it is known.

    Raises:
        UnknownSubjectError: if the subject may be another.
    """
    has_record = recorded_weights_hash(lens.provenance) is not None
    if is_known(lens, subject, by_commit) or not (has_record or is_named):
        return
    if has_record:
        why = f"it is {why_not_compared(lens.config.base_config, subject)}"
        mend = f"load it in {precision(lens.config.base_config)}"
    else:
        why, mend = "the lens has no record of its subject's weights", "leave out --model"
    raise UnknownSubjectError(
        f"subject: {subject.name_or_path!r} was not compared with the model that the lens was made for: {why}; {mend}"
        + (f", or {otherwise}" if otherwise else "")
    )
