"""`consistency-lens train --push_to_hub true`: the run's artifact with its card on a Hub on loopback."""

import json

from cache_runs import text, write_subject
from hub_server import TOKEN
from train_runs import flags

from consistency_lens.cli.train import main
from consistency_lens.modeling_consistency_lens import ConsistencyLensModel
from consistency_lens.remote_code import remote_code

CODE = {*remote_code(ConsistencyLensModel), ".gitattributes"}
MEASURED = {"metrics.json", "samples.jsonl", "log_history.json", "run.json", "training_arguments.json"}


def test_a_run_is_published_with_its_card_and_figures(hub, tmp_path, monkeypatch, capsys):
    write_subject(tmp_path)
    (tmp_path / "text.txt").write_text(text(24))
    monkeypatch.delenv("HF_TOKEN")
    run = tmp_path / "run"
    settings = {"push_to_hub": True, "hub_model_id": "mine", "hub_private_repo": True, "hub_token": TOKEN}
    short = {"max_steps": 3, "save_steps": 3, "eval_strategy": "no", "sample_steps": 0}
    call = flags(tmp_path, run, **settings, **short)
    assert main([*call[: call.index("--stages")], "--stages", "warm_start"]) == 0, capsys.readouterr().err
    repo = hub.model("user/mine")
    published = {name: blob.content for name, blob in repo.head.files.items() if name not in CODE}
    artifact = {"README.md", "config.json", "model.safetensors", "provenance.json", "tokenizer.json"}
    assert published.keys() == artifact | MEASURED | {"tokenizer_config.json"}
    assert repo.private and repo.head.title == "End of training"
    figures = json.loads((run / "metrics.json").read_text())
    assert json.loads(published["metrics.json"])["fve"] == figures["fve"]
    card = published["README.md"].decode()
    assert f"{figures['fve']:.3f}" in card and 'from_pretrained("user/mine"' in card
    everything = b"".join([*(file.read_bytes() for file in run.rglob("*") if file.is_file()), *published.values()])
    said = "".join(capsys.readouterr())
    assert TOKEN.encode() not in everything and TOKEN not in said
    assert str(tmp_path).encode() not in b"".join(published[name] for name in published if name.endswith(".json"))


def test_a_token_without_the_right_ends_the_run_at_once(hub, tmp_path, capsys):
    write_subject(tmp_path)
    (tmp_path / "text.txt").write_text(text(24))
    call = flags(tmp_path, tmp_path / "run", push_to_hub=True, hub_model_id="somebody/lens", hub_token="hf_planted")
    assert main(call) == 2
    said = "".join(capsys.readouterr())
    assert "does not take the token" in said and "planted" not in said
    assert not (tmp_path / "run" / "data").exists()
