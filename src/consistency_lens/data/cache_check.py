"""What a check of an artifact has found."""

from typing import NamedTuple


class VerificationError(Exception):
    """An artifact, or what came of it over a network, is not what its provenance or its index says."""


class Check(NamedTuple):
    """What one check found."""

    name: str
    passed: bool
    detail: str
    """What was checked, or each thing that is wrong, a line each."""
    checked: bool = True
    """False if it could not be made, or not of all rows: then it has not passed, but has found nothing wrong."""
