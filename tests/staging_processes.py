"""Processes that are uploading, as far as others can see."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TAKES = """
import sys
from pathlib import Path
from consistency_lens.hub.staging_folder import StagingFolder

staging = StagingFolder(Path(sys.argv[1]))
(staging.path / "file").write_text("being uploaded")
print(staging.path.name, flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(place: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has taken a staging folder, until it is killed; gives it and the folder's name."""
    with subprocess.Popen(
        [sys.executable, "-c", TAKES, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()
