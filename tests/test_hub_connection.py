"""The Hub's errors in one line."""

import errno
import os

import pytest

from consistency_lens.hub_connection import HubError, asking_hub, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [(OSError("one\n\ntwo"), "one"), (OSError("\n  first \nsecond"), "first"), (TimeoutError(), "TimeoutError")],
)
def test_an_error_is_told_in_one_line(error, line):
    assert first_line(error) == line
    with pytest.raises(HubError) as caught, asking_hub("user/cache"):
        raise error
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_what_went_wrong_in_a_thread_is_what_is_told():
    with pytest.raises(HubError, match="connection reset"), asking_hub("user/cache"):
        raise RuntimeError("Error while uploading 'data/train.parquet' to the Hub.") from OSError("connection reset")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_full_disk_is_not_taken_for_the_hub(code, in_thread):
    full = OSError(code, os.strerror(code), "/cache/blob")
    with pytest.raises(OSError, match="no room on the disk .* 'user/cache'") as caught, asking_hub("user/cache"):
        if in_thread:
            raise RuntimeError("Error while uploading") from full
        raise full
    assert not isinstance(caught.value, HubError) and caught.value.errno == code
    assert "reached" not in str(caught.value)


def test_other_errors_pass():
    with pytest.raises(KeyError), asking_hub("user/cache"):
        raise KeyError("a mistake of the program")
