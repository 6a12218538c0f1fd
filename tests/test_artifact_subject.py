"""Whether the subject that a saved lens is laid over is the one that it was made for."""

import json
from pathlib import Path

import pytest
import torch
from tiny_lenses import LAYER, tiny_tokenizer
from tiny_models import tiny_model
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from consistency_lens import ConsistencyLensModel, LensDecoder, LensEncoder, TunedLens
from consistency_lens.artifact_subject import precision
from consistency_lens.fingerprints import weights_hash

KINDS = ("lens", "decoder", "encoder", "tuned")
REFUSED = r"has weights of hash .*, the lens was made for .*verify_base=False to read another"


@pytest.fixture(scope="module")
def subject_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("subject")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(subject_folder, tmp_path_factory) -> Path:
    """A folder of each kind, with the hash of the subject's weights where its provenance has it."""
    root = tmp_path_factory.mktemp("saved")
    subject = AutoModelForCausalLM.from_pretrained(subject_folder)
    lens = ConsistencyLensModel.from_subject(subject, tiny_tokenizer(), LAYER, training="frozen")
    parts = {"lens": lens, "decoder": lens.decoder, "encoder": lens.encoder}
    for kind, model in parts.items():
        model.provenance = {"cache": {"weights_hash": weights_hash(subject)}}
        model.save_pretrained(root / kind)
    tuned = TunedLens.for_model(subject, tiny_tokenizer())
    tuned.provenance = {"weights_hash": weights_hash(subject)}
    tuned.save_pretrained(root / "tuned")
    return root


def other_model(subject_folder: Path) -> PreTrainedModel:
    """The subject, one of whose weights is off by the least bit."""
    model = AutoModelForCausalLM.from_pretrained(subject_folder)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[5, 0] = torch.nextafter(weight[5, 0], torch.tensor(9.0))
    return model


def read(model: PreTrainedModel) -> None:
    """Has the subject loaded, where a lens leaves that until it is asked for."""
    if isinstance(model, ConsistencyLensModel):
        assert model.subject.stream.num_layers
    elif isinstance(model, TunedLens):
        assert model.stream.num_layers


@pytest.mark.parametrize("kind", KINDS)
class TestEachKind:
    def test_its_own_subject_is_taken(self, saved, subject_folder, kind):
        read(AutoModel.from_pretrained(saved / kind, verify_base=True))
        read(AutoModel.from_pretrained(saved / kind, base_model=str(subject_folder)))

    def test_other_weights_are_refused(self, saved, subject_folder, kind):
        with pytest.raises(ValueError, match=REFUSED):
            AutoModel.from_pretrained(saved / kind, base_model=other_model(subject_folder))

    def test_other_weights_are_taken_where_they_are_asked_for(self, saved, subject_folder, kind):
        read(AutoModel.from_pretrained(saved / kind, base_model=other_model(subject_folder), verify_base=False))

    def test_weights_that_changed_in_their_folder_are_refused(self, saved, subject_folder, kind, tmp_path):
        moved = tmp_path / "subject"
        other_model(subject_folder).save_pretrained(moved)
        config = json.loads((saved / kind / "config.json").read_text().replace(str(subject_folder), str(moved)))
        for file in (saved / kind).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=REFUSED):
            read(AutoModel.from_pretrained(tmp_path))


class TestWhatCannotBeCompared:
    def test_another_precision_is_let_through(self, saved, subject_folder):
        loaded = AutoModel.from_pretrained(saved / "decoder", dtype=torch.bfloat16)
        assert isinstance(loaded, LensDecoder) and loaded.base.dtype == torch.bfloat16

    def test_another_precision_is_refused_if_it_must_be_compared(self, saved):
        with pytest.raises(ValueError, match="loaded in bfloat16, the hash of its weights was taken in float32"):
            AutoModel.from_pretrained(saved / "encoder", dtype=torch.bfloat16, verify_base=True)

    def test_a_lens_without_a_hash(self, saved, subject_folder, tmp_path):
        lens = AutoModel.from_pretrained(saved / "encoder")
        lens.provenance = None
        lens.save_pretrained(tmp_path)
        other = other_model(subject_folder)
        assert isinstance(AutoModel.from_pretrained(tmp_path, base_model=other), LensEncoder)
        with pytest.raises(ValueError, match="records no hash of its subject's weights; leave out verify_base"):
            AutoModel.from_pretrained(tmp_path, base_model=other, verify_base=True)

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_a_broken_provenance(self, saved, tmp_path, text):
        for file in (saved / "encoder").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "provenance.json").write_text(text)
        with pytest.raises(ValueError, match="artifact: .*provenance.json"):
            AutoModel.from_pretrained(tmp_path)

    def test_precision_in_words(self):
        bits = BitsAndBytesConfig(load_in_8bit=True).to_dict()
        assert precision({"dtype": "float16", "quantization_config": bits}) == "float16 in 8bit"
        assert precision({}) == precision({}, torch.float32) == "float32"
