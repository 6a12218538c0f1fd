"""Artifacts from the Hub where this package is not installed, in a process that has transformers alone."""

import json
import os
import subprocess
import sys
import sysconfig

import pytest
import torch
from published_lenses import add_subject, save_subject
from tiny_lenses import activations, disturb, tiny_tokenizer
from tiny_models import tiny_model

from consistency_lens import ConsistencyLensModel, TunedLens

SUBJECT, TEXT = "org/tiny", "w3 w9 w27 w5"
TRAININGS = ("frozen", "full", "lora")
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
READ = """
import json, sys

sys.path.append({packages!r})  # their .pth files are not read: this package has none there
sys.modules["datasets"] = sys.modules["jinja2"] = None
try:
    import consistency_lens
    raise SystemExit("consistency_lens is there")
except ModuleNotFoundError:
    pass

import torch
from transformers import AutoConfig, AutoModel

activations = torch.tensor({activations})
found = {{}}
for training in {trainings}:
    lens, decoder, encoder = (
        AutoModel.from_pretrained(f"user/{{training}}-{{part}}", trust_remote_code=True)
        for part in ("lens", "decoder", "encoder")
    )
    ids = decoder.generate_ids(activations, None, 4)
    explanation = lens.explain({text!r}).to_dict()
    found[training] = [explanation, ids.tolist(), encoder(encoder.embed_ids(ids)).tolist()]
lens.save_pretrained({folder!r})
again = AutoModel.from_pretrained({folder!r}, trust_remote_code=True)
found["again"] = again.explain({text!r}).to_dict()
found["pushed"] = lens.push_to_hub("user/again").oid
assert AutoConfig.from_pretrained("user/frozen-lens", trust_remote_code=True).layer == 1
found["tuned"] = AutoModel.from_pretrained("user/tuned", trust_remote_code=True).trajectory({text!r}).top_tokens
found["of_package"] = [name for name in sys.modules if name.startswith("consistency_lens")]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_what_is_on_the_hub_reads_the_same_where_the_package_is_not_installed(hub, tmp_path):
    commit = add_subject(hub, SUBJECT, save_subject(tmp_path / "subject"))
    subject = tiny_model("llama")
    subject.config.name_or_path = SUBJECT
    expected = {}
    for training in TRAININGS:
        lens = ConsistencyLensModel.from_subject(
            subject, tiny_tokenizer(), 1, num_text_tokens=4, training=training, revision=commit,
            lora=LORA if training == "lora" else None,
        )  # fmt: skip
        lens.set_statistics(torch.linspace(-1, 1, 32), 1.7)
        disturb(lens).eval()
        for part, model in (("lens", lens), ("decoder", lens.decoder), ("encoder", lens.encoder)):
            model.push_to_hub(f"user/{training}-{part}")
        ids = lens.decoder.generate_ids(activations(), None, 4)
        reconstruction = lens.encoder(lens.encoder.embed_ids(ids))
        expected[training] = [lens.explain(TEXT).to_dict(), ids.tolist(), reconstruction.tolist()]
    tuned = TunedLens.for_model(subject, tiny_tokenizer(), revision=commit)
    tuned.push_to_hub("user/tuned")
    expected |= {"again": expected["lora"][0], "tuned": tuned.trajectory(TEXT).top_tokens, "of_package": []}

    read = READ.format(
        packages=sysconfig.get_path("purelib"), activations=activations().tolist(), trainings=TRAININGS, text=TEXT,
        folder=str(tmp_path / "again"),
    )  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", read], env=kept | own, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("pushed") == hub.model("user/again").head.oid
    assert "lens_decoder.py" in hub.model("user/again").head.files
    assert found == json.loads(json.dumps(expected))
