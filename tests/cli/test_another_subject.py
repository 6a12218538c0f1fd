"""`--verify_base` of `explain` and `serve`: whether they read another model than the lens was made for."""

import json
import socket

import pytest
import uvicorn
from starlette.testclient import TestClient
from tiny_lenses import disturb, tiny_lens, tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens import ConsistencyLensModel
from consistency_lens.cli.main import main
from consistency_lens.fingerprints import weights_hash

TEXT = "w9 w10 w11 w12"
REFUSED = "verify_base=False to read another (explain and serve: --verify_base false)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A lens that knows the weights of its subject, that subject, and another of its architecture."""
    folder = tmp_path_factory.mktemp("another_subject")
    lens = disturb(tiny_lens())
    lens.provenance = {"cache": {"weights_hash": weights_hash(lens.subject.model)}}
    lens.save_pretrained(folder / "lens")
    for name, model in (("subject", lens.subject.model), ("other", tiny_model("llama", seed=1))):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def explain(folder, model, *line):
    place = ("--lens", str(folder / "lens"), "--model", str(folder / model), "--device", "cpu")
    return main(["explain", TEXT, *place, "--json", *line])


def explained(folder, model):
    """What is to be read of the text, as JSON has it."""
    lens = ConsistencyLensModel.from_pretrained(folder / "lens", base_model=str(folder / model), verify_base=False)
    return json.loads(json.dumps(lens.explain(TEXT).to_dict()))


def test_another_subject_is_read_where_it_is_asked_for(folder, capsys):
    assert explain(folder, "other") == 2
    assert REFUSED in capsys.readouterr().err
    assert explain(folder, "other", "--verify_base", "false") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == explained(folder, "other") != explained(folder, "subject")


def test_its_own_may_be_asked_for_in_so_many_words(folder, capsys):
    assert explain(folder, "subject", "--verify_base", "true") == 0
    assert json.loads(capsys.readouterr().out) == explained(folder, "subject")
    assert explain(folder, "other", "--verify_base", "true") == 2
    assert REFUSED in capsys.readouterr().err
    # in another precision another model passes by default, for it cannot be compared
    assert explain(folder, "other", "--dtype", "bfloat16") == 0
    capsys.readouterr()
    assert explain(folder, "other", "--dtype", "bfloat16", "--verify_base", "true") == 2
    assert "error: verify_base: the subject is loaded in bfloat16, the hash of its weights" in capsys.readouterr().err


def test_a_page_with_a_lens_behind_it_reads_another_subject_too(folder, monkeypatch, capsys):
    apps = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **_: apps.append(app))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = ["serve", str(folder / "lens"), "--model", str(folder / "other"), "--device", "cpu", "--port", str(port)]
    assert main(line) == 2 and REFUSED in capsys.readouterr().err
    assert main([*line, "--verify_base", "false"]) == 0
    with TestClient(apps.pop(), base_url="http://127.0.0.1") as client:
        (said,) = client.post("/api/explain", json={"text": TEXT}).json()["texts"]
    assert said["fve"] == pytest.approx([row["fve"] for row in explained(folder, "other")["tokens"]], rel=1e-3)


@pytest.mark.parametrize("command", ["eval", "report", "tuned-lens eval", "tuned-lens sweep", "tuned-lens gates"])
def test_commands_that_keep_what_they_find_have_no_such_flag(command, capsys):
    assert main([*command.split(), "--verify_base", "false"]) == 2
    assert "error: --verify_base: unknown" in capsys.readouterr().err
