"""Streaming from a Hub: `data.streaming` with a real client, and training on what it gives."""

import json

import numpy as np
import pytest
from hub_http import Reply
from published_caches import build_caches

from consistency_lens.cli.eval import main as evaluate
from consistency_lens.cli.train import main as train
from consistency_lens.data import sources
from consistency_lens.data.activation_cache import ActivationCache
from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.data.streaming import open_stream
from consistency_lens.hub.cache_push import push_cache
from consistency_lens.hub_connection import HubError

REPO = "user/activations"


@pytest.fixture
def built(hub, tmp_path):
    caches = build_caches(tmp_path / "caches")
    push_cache(caches.layer, REPO, progress=False)
    return caches


def test_a_stream_gives_the_rows_of_the_cache_and_leaves_no_shard_on_the_disk(built, tmp_path):
    for split in ("train", "validation"):
        stream, cache = open_stream(REPO, split), ActivationCache.open(built.layer / split)
        assert len(stream) == len(cache)
        np.testing.assert_allclose(stream.mean, cache.mean)
        expected = ActivationRows(cache).__getitems__(list(range(len(cache))))
        for row, other in zip(stream.__getitems__(list(range(len(stream)))), expected, strict=True):
            assert row.keys() == other.keys()
            for name in row:
                np.testing.assert_array_equal(row[name], other[name])
    kept = [file for file in (tmp_path / "hub_cache").rglob("*") if file.is_file()]
    assert kept and not [file for file in kept if file.suffix == ".parquet"]


def test_a_stream_stays_at_its_commit(built, hub, tmp_path):
    stream = open_stream(REPO, "train")
    before = stream[0]["activation"].tolist()
    other = build_caches(tmp_path / "other", positions_per_sequence=2)
    push_cache(other.layer, REPO, progress=False)
    again = open_stream(REPO, "train", revision=stream.provenance["streamed_from"]["commit"])
    assert again[0]["activation"].tolist() == before and len(again) == len(stream)
    assert len(open_stream(REPO, "train")) != len(stream)


def test_what_was_changed_on_the_way_is_refused(built, hub):
    stream = open_stream(REPO, "train")
    name = stream.provenance["parquet"][0]["file"]
    stream.provenance["parquet"][0]["sha256"] = "0" * 64
    with pytest.raises(ValueError, match=f"the sha256 of '{name}' is not 0000"):
        stream[0]


def test_a_hub_that_is_gone_is_one_line(built, hub, monkeypatch):
    monkeypatch.setattr("consistency_lens.data.streaming.RETRY_SECONDS", (0,))
    with pytest.raises(ValueError, match="repo: no 'no/such' on the Hub"):
        open_stream("no/such", "train")
    with pytest.raises(ValueError, match="revision: 'user/activations' has no 'v9'"):
        open_stream(REPO, "train", revision="v9")
    stream = open_stream(REPO, "train")
    hub.faults["GET", "train-00000"] = Reply({"error": "down"}, 500)
    with pytest.raises(HubError, match="fails or cannot be reached"):
        stream[0]


def test_a_lens_is_trained_and_evaluated_on_a_stream(built, tmp_path, monkeypatch):
    settings = {
        "model": built.subject, "activations": REPO, "num_text_tokens": 3, "eval_rows": 16, "num_samples": 2,
        "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "output_dir": tmp_path / "run",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 2, "stream_window": 2,
        "seed": 7,
    }  # fmt: skip
    assert train([part for name, value in settings.items() for part in (f"--{name}", str(value))]) == 0
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["cache"]["streamed_from"]["repo"] == REPO and "parquet" not in provenance["cache"]
    assert provenance["recipe"]["layer"] is None and provenance["cache"]["layer"] == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    held_out = ActivationCache.open(built.layer / "validation")
    assert metrics["rows"] == 16 and metrics["documents"] <= len(set(held_out.documents))
    streams = []
    monkeypatch.setattr(sources, "open_stream", lambda *args: streams.append(open_stream(*args)) or streams[-1])
    assert evaluate(["--lens", str(tmp_path / "run"), "--rows", "16", "--checks", "none"]) == 0
    assert [len(stream._shards) for stream in streams] == [0, 0]
    again = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert again["fve"] == pytest.approx(metrics["fve"], rel=1e-6)
