import json
import shutil
from pathlib import Path

import pytest
from report_documents import made_up_explorer, made_up_text_length

from consistency_lens.report.explorer_file import EXPLORER_FILE, write_explorer

CARDS = Path(__file__).parents[2] / "model_cards" / "tiny_stories"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The kept files of a real run; the check of text length, a control far below 0 and the explorer are made up."""
    folder = tmp_path_factory.mktemp("runs") / "stories"
    folder.mkdir()
    for name in ("run.json", "log_history.json"):
        shutil.copy(CARDS / name, folder)
    metrics = json.loads((CARDS / "metrics.json").read_text()) | {"text_length": made_up_text_length()}
    metrics["controls"]["empty_text"]["fve"] = -4.75
    (folder / "metrics.json").write_text(json.dumps(metrics))
    write_explorer(folder / EXPLORER_FILE, made_up_explorer(texts=4, tokens=60))
    return folder


@pytest.fixture(scope="module")
def metrics(run):
    return json.loads((run / "metrics.json").read_text())
