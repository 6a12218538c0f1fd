"""What all commands do alike: logging, a console, and errors as one line and an exit code."""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .dispatch import DEBUG_FLAG, DEBUG_VARIABLE, reader_is_gone

if TYPE_CHECKING:
    from rich.console import Console

DONE, FAILED, MISTAKE, NOT_VERIFIED = 0, 1, 2, 3
INTERRUPTED = 130  # as shells tell Ctrl-C
# They report every request, or at every import what they could not load.
TALKATIVE = ("httpx", "httpx2", "bitsandbytes")
# DeepSpeed warns of it wherever it is installed, used or not.
NO_NEWS = "Setting accelerator to CPU"
# Seconds that the first of several processes has to say what went wrong, and its launcher to end the others.
FIRST_SPEAKS = 10.0


def run_command(
    work: "Callable[[Console], int | None]", failures: Mapping[type[BaseException], int] | None = None
) -> int:
    """Runs the work of a command, and returns its exit code.

    Args:
        work: gets the console that it prints to; returns the exit code, None for 0.
        failures: kinds of errors that end in one line, with their exit codes, besides `ValueError`, the user's
            mistake, and `OSError`. With CONSISTENCY_LENS_DEBUG (`--debug`) their tracebacks are shown too.
    """
    import transformers
    from rich.console import Console

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    # a filter, for DeepSpeed sets its level itself when it is imported
    logging.getLogger("DeepSpeed").addFilter(lambda record: NO_NEWS not in record.getMessage())
    # the newer name is not in all versions that we take
    warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
    transformers.utils.logging.set_verbosity_warning()
    if hasattr(sys.stdout, "reconfigure"):  # a token that the terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    codes: dict[type[BaseException], int] = {**(failures or {}), ValueError: MISTAKE, OSError: FAILED}
    try:
        return work(Console(width=None if _is_terminal(sys.stdout) else 150)) or DONE
    except tuple(codes) as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            return FAILED
        code = next(code for kind, code in codes.items() if isinstance(error, kind))
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exc()
        if os.environ.get("RANK", "0") not in ("", "0"):
            # mostly all of them make the same mistake; alone it is told late
            time.sleep(FIRST_SPEAKS)
        message = f"{'error' if code == MISTAKE else 'failed'}: {str(error) or type(error).__name__}"
        _complain(message)
        return code
    except KeyboardInterrupt:
        if os.environ.get(DEBUG_VARIABLE) or not _is_terminal(sys.stderr):
            raise
        _complain(f"interrupted ({DEBUG_FLAG} shows where)")
        return INTERRUPTED
    except Exception as error:
        # A fault of this library or of one below it. A job's log keeps where it was; a person is told how to see it.
        if os.environ.get(DEBUG_VARIABLE) or not _is_terminal(sys.stderr):
            raise
        said = " ".join(str(error).split())
        _complain(f"failed: {type(error).__name__}: {said} (an unexpected error; {DEBUG_FLAG} shows where)")
        return FAILED


def _is_terminal(stream: Any) -> bool:
    """Whether a person reads a stream; it is None where it was closed before the start."""
    return stream is not None and stream.isatty()


def _complain(message: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
