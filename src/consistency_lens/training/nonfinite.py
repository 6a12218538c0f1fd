"""The error of a run without finite gradients, where a command may name it without importing the trainer."""


class NonfiniteGradientsError(RuntimeError):
    """Raised when a run does nothing but skip steps."""
