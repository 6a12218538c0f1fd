import json

import pytest
import torch
from accelerate import PartialState
from datasets import load_dataset
from lens_runs import tiny_cache, tiny_lens

from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.evaluation import explaining
from consistency_lens.evaluation.explaining import SETTINGS_FILE, explain_dataset, shard_file
from consistency_lens.losses import kl_divergence

ROWS = 72


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    subject, tokenizer, cache = tiny_cache(tmp_path_factory.mktemp("cache"))
    return tiny_lens(subject, tokenizer, cache), ActivationRows(cache)


def explain(setting, folder, **arguments):
    lens, rows = setting
    return explain_dataset(
        lens, rows, folder, **({"rows_per_shard": 25, "batch_size": 10, "progress": False} | arguments)
    )


@pytest.fixture(scope="module")
def explained(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explained")
    return folder, explain(setting, folder, measures=["fve", "kl"])


def test_every_row_has_the_text_and_the_measures_that_the_lens_gives_it_alone(setting, explained):
    lens, rows = setting
    folder, found = explained
    assert found["row"] == list(range(ROWS)) and len(list((folder / "data").iterdir())) == 3
    for index in (0, 26, 71):
        row = rows[index]
        activation = torch.tensor(row["activation"])[None]
        decoded = lens.decode(activation)
        assert (found[index]["text"], found[index]["text_ids"]) == (decoded.texts[0], decoded.token_ids[0].tolist())
        assert (found[index]["document"], found[index]["position"]) == (row["document"], row["position"])
        assert found[index]["token"] == lens.tokenizer.decode([row["input_ids"][-1]])
        reconstruction = lens.read_ids(decoded.token_ids)
        fve = 1 - (activation - reconstruction).square().sum() / (activation - lens.mean).square().sum()
        assert found[index]["fve"] == pytest.approx(fve.item(), abs=1e-5)
        input_ids = torch.tensor(row["input_ids"])[None].long()
        position = torch.tensor([[row["position"]]])
        context = lens.subject.context(input_ids, torch.ones_like(input_ids), position)
        after = lens.subject.replaced_logits_full(context, reconstruction[None])
        assert found[index]["kl"] == pytest.approx(kl_divergence(context.logits, after).item(), abs=1e-4)


def test_datasets_opens_the_folder(explained, tmp_path):
    folder, found = explained
    loaded = load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    assert loaded.column_names == found.column_names and loaded["text"] == found["text"]


def test_batch_size_sharing_and_passes_change_nothing(setting, explained, tmp_path):
    _, found = explained
    settings = {"share_contexts": False, "passes_by_length": False}
    other = explain(setting, tmp_path, measures=["fve", "kl"], batch_size=64, **settings)
    assert other["text"] == found["text"]
    for name in ("fve", "kl"):
        torch.testing.assert_close(torch.tensor(other[name]), torch.tensor(found[name]), rtol=1e-4, atol=1e-5)


def test_a_run_that_was_killed_makes_the_missing_shards_alone(setting, tmp_path, monkeypatch):
    whole = explain(setting, tmp_path / "whole")
    calls, real = [], explaining.explained

    def killed(lens, batch, *settings):
        calls.append(batch["rows"].tolist())
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(lens, batch, *settings)

    monkeypatch.setattr(explaining, "explained", killed)
    with pytest.raises(KeyboardInterrupt):
        explain(setting, tmp_path / "cut")
    assert [shard_file(tmp_path / "cut", i).is_file() for i in range(3)] == [True, False, False]
    found = explain(setting, tmp_path / "cut")
    assert calls[5][0] == 25  # the first row of the second shard
    assert found.to_dict() == whole.to_dict()
    calls.clear()
    assert explain(setting, tmp_path / "cut")["text"] == whole["text"] and calls == []


def test_processes_share_the_shards(setting, tmp_path, monkeypatch):
    whole = explain(setting, tmp_path / "whole")
    state = PartialState(cpu=True)
    monkeypatch.setattr(state, "num_processes", 2, raising=False)
    monkeypatch.setattr(state, "wait_for_everyone", lambda: None)
    for process in (1, 0):
        monkeypatch.setattr(state, "process_index", process, raising=False)
        found = explain(setting, tmp_path / "shared", state=state)
        shards = [shard_file(tmp_path / "shared", i).is_file() for i in range(3)]
        assert shards == [process == 0, True, process == 0]
        assert (found is None) == (process == 1)
    assert found.to_dict() == whole.to_dict()


def test_a_folder_of_another_lens_or_of_other_settings_is_refused(setting, explained, tmp_path):
    lens, rows = setting
    folder, _ = explained
    with pytest.raises(ValueError, match=r"has explanations with measures \['fve', 'kl'\], now it is \['fve'\]"):
        explain(setting, folder)
    other = tiny_lens(lens.subject, lens.tokenizer, rows.source, num_text_tokens=3)
    with torch.no_grad():
        other.decoder.projection.bias.add_(1.0)
    with pytest.raises(ValueError, match="has explanations with lens"):
        explain((other, rows), folder, measures=["fve", "kl"])
    assert json.loads((folder / SETTINGS_FILE).read_text())["source"]["layer"] == lens.config.layer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measures": ["bleu"]}, "measures: any of fve, kl, got 'bleu'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rows_per_shard": 0}, "rows_per_shard must be at least 1"),
    ],
)
def test_arguments_that_are_none_are_refused(setting, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        explain(setting, tmp_path, **arguments)
    assert not any(tmp_path.iterdir())
