"""Calls of `consistency-lens generate-chat`: two prompts and the flags."""

import pytest
from chat_server import MODEL


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One [b]?"}\n{"prompt": "Two?"}\n')

    def flags(url, **changes):
        settings = {
            "prompts": tmp_path / "prompts.jsonl", "output_dir": tmp_path / "answers", "model": MODEL, "base_url": url,
            "retry_delay": 0.001, "max_tries": 2, "concurrency": 1,
        } | changes  # fmt: skip
        return [part for name, value in settings.items() for part in (f"--{name}", str(value))]

    return flags
