"""Lenses of AlignmentResearch/tuned-lens: read right, and refused where they are not what they should be."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from tiny_models import NUM_LAYERS, WIDTH, random_tokens, tiny_model
from torch.nn.functional import linear

from consistency_lens.tuned_lens.interchange import PUBLISHED, from_alignment_research, unembedding_hash
from consistency_lens.tuned_lens.modeling_tuned_lens import TunedLens

CONFIG = {
    "base_model_name_or_path": "org/tiny",
    "base_model_revision": None,
    "d_model": WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "bias": True,
    "lens_type": "linear_tuned_lens",
    "unembed_hash": None,
}


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def subject():
    return tiny_model("llama")


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(2)
    shapes = {"weight": (WIDTH, WIDTH), "bias": (WIDTH,)}
    return {
        f"{index}.{name}": 0.1 * torch.randn(shape, generator=generator)
        for index in range(NUM_LAYERS)
        for name, shape in shapes.items()
    }


def write(folder, parameters, **fields):
    """A folder as the other library saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    torch.save(parameters, folder / "params.pt")
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_logits_are_those_of_the_translator_before_the_norm(family, parameters, tmp_path):
    subject = tiny_model(family)
    head_hash = unembedding_hash(subject.get_output_embeddings().weight)
    lens = from_alignment_research(write(tmp_path, parameters, unembed_hash=head_hash), subject)
    ids, _ = random_tokens(9)
    hidden_states = subject(input_ids=ids, output_hidden_states=True).hidden_states
    norm = subject.get_decoder().ln_f if family == "gpt2" else subject.get_decoder().norm
    for layer in range(NUM_LAYERS - 1):
        weight, bias = parameters[f"{layer + 1}.weight"], parameters[f"{layer + 1}.bias"]
        hidden = hidden_states[layer + 1]
        expected = subject.get_output_embeddings()(norm(hidden + linear(hidden, weight, bias)))
        if family == "gemma2":
            expected = 30 * torch.tanh(expected / 30)
        torch.testing.assert_close(lens.logits(layer, lens.residuals(ids)[layer]), expected, rtol=1e-4, atol=1e-4)
    last = lens.logits(NUM_LAYERS - 1, lens.residuals(ids)[-1])
    torch.testing.assert_close(last, subject(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_it_is_saved_and_loaded_as_any_lens(subject, parameters, tmp_path):
    lens = from_alignment_research(write(tmp_path / "theirs", parameters), subject)
    lens.save_pretrained(tmp_path / "ours")
    loaded = TunedLens.from_pretrained(tmp_path / "ours", base_model=subject)
    residual = torch.randn(5, WIDTH)
    assert torch.equal(loaded.logits(1, residual), lens.logits(1, residual))
    assert loaded.provenance["translator"] == {
        "rank": None,
        "temperature": False,
        "parameters": (NUM_LAYERS - 1) * (WIDTH + 1) * WIDTH,
        "place": "before_norm",
    }
    assert loaded.provenance["source"]["folder"] == str(tmp_path / "theirs")


def test_half_precision_parameters_are_read(subject, parameters, tmp_path):
    half = {name: tensor.half() for name, tensor in parameters.items()}
    lens = from_alignment_research(write(tmp_path, half), subject)
    assert torch.equal(lens.translators[0].W, half["1.weight"].float().T)


def test_a_lens_of_the_hub_is_pinned_to_its_commit(hub, subject, parameters, tmp_path):
    folder = write(tmp_path / "lens", parameters)
    subject.config.name_or_path = "org/tiny"
    files = {f"lens/org/tiny/{file.name}": file.read_bytes() for file in folder.iterdir()}
    repo = hub.add_repo("space", PUBLISHED, files)
    lens = from_alignment_research(PUBLISHED, subject)
    assert torch.equal(lens.translators[0].c, parameters["1.bias"])
    source = lens.provenance["source"]
    assert source["revision"] == repo.head.oid and source["subfolder"] == "lens/org/tiny"
    assert source["sha256"] == hashlib.sha256(files["lens/org/tiny/params.pt"]).hexdigest()
    with pytest.raises(ValueError, match="has no lens/org/other/config.json; pass as subfolder"):
        from_alignment_research(PUBLISHED, subject, subfolder="lens/org/other")
    with pytest.raises(ValueError, match="has no 'v9'; pass a commit"):
        from_alignment_research(PUBLISHED, subject, revision="v9")
    with pytest.raises(ValueError, match="no 'org/nothing' on the Hub"):
        from_alignment_research("org/nothing", subject)


def test_what_is_not_tensors_is_not_unpickled(subject, tmp_path):
    write(tmp_path, {"0.weight": Malicious(tmp_path / "made")})
    with pytest.raises(ValueError, match="holds more than tensors, or is damaged") as caught:
        from_alignment_research(tmp_path, subject)
    assert not (tmp_path / "made").exists() and "\n" not in str(caught.value)


def test_a_damaged_file_is_refused(subject, parameters, tmp_path):
    file = write(tmp_path, parameters) / "params.pt"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="or is damaged"):
        from_alignment_research(tmp_path, subject)


@pytest.mark.parametrize("name", ["config.json", "params.pt"])
def test_a_missing_file_is_named(subject, parameters, tmp_path, name):
    (write(tmp_path, parameters) / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}; pass the folder"):
        from_alignment_research(tmp_path, subject)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 64}, "the lens has d_model 64, the subject 32; pass the model .*'org/tiny'"),
        ({"num_hidden_layers": 12}, "the lens has num_hidden_layers 12, the subject 3"),
        ({"lens_type": "mlp_tuned_lens"}, "lens_type is 'mlp_tuned_lens', only linear_tuned_lens"),
        (
            {"unembed_hash": "0" * 64},
            r"its unembedding is not the one .*unembed_hash 000000000000…\); pass .*from Python",
        ),
    ],
)
def test_a_lens_of_another_model_is_refused(subject, parameters, tmp_path, fields, message):
    write(tmp_path, parameters, **fields)
    with pytest.raises(ValueError, match=message):
        from_alignment_research(tmp_path, subject)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_another_config_is_refused(subject, parameters, tmp_path, content):
    (write(tmp_path, parameters) / "config.json").write_text(content)
    with pytest.raises(ValueError, match="is no JSON|is no configuration of tuned-lens"):
        from_alignment_research(tmp_path, subject)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": None}, "must hold weight and bias of 3 translators, it differs in 0.weight"),
        ({"3.weight": torch.zeros(1)}, "it differs in 3.weight"),
        ({"1.bias": torch.zeros(3)}, r"1.bias in params.pt must have shape \(32,\), got \(3,\)"),
        ({"1.bias": 1.0}, r"1.bias in params.pt must have shape \(32,\), got float"),
        ({"2.bias": torch.full((WIDTH,), float("nan"))}, "2.bias in params.pt holds NaN"),
    ],
)
def test_other_parameters_are_refused(subject, parameters, tmp_path, change, message):
    changed = {name: value for name, value in (parameters | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_alignment_research(write(tmp_path, changed), subject)


def test_a_list_of_parameters_is_refused(subject, parameters, tmp_path):
    with pytest.raises(ValueError, match="it differs in .*; it is no lens of this model"):
        from_alignment_research(write(tmp_path, list(parameters.values())), subject)


def test_the_check_of_the_unembedding_can_be_left_out(subject, parameters, tmp_path, caplog):
    write(tmp_path, parameters, unembed_hash="0" * 64)
    assert from_alignment_research(tmp_path, subject, check_unembedding=False).num_layers == NUM_LAYERS
    write(tmp_path, parameters)
    from_alignment_research(tmp_path, subject)
    assert "the lens has no unembed_hash" in caplog.text


def test_the_hash_is_of_the_printed_corners():
    weight = (torch.arange(5000, dtype=torch.float32) % 7).reshape(50, 100)
    printed = (
        "[[0. 1. 2. ... 6. 0. 1.]\n [2. 3. 4. ... 1. 2. 3.]\n [4. 5. 6. ... 3. 4. 5.]\n ...\n"
        " [3. 4. 5. ... 2. 3. 4.]\n [5. 6. 0. ... 4. 5. 6.]\n [0. 1. 2. ... 6. 0. 1.]]"
    )
    expected = hashlib.sha256(printed.encode()).hexdigest()
    assert unembedding_hash(weight) == expected
    with np.printoptions(threshold=1, edgeitems=1, precision=8, sign="+"):  # a program's own printing changes nothing
        assert unembedding_hash(weight) == expected


def test_a_subject_in_another_precision_passes(subject, parameters, tmp_path):
    head = subject.get_output_embeddings().weight
    with torch.no_grad():
        head[0, 0] = 0.2502  # 0.3 to one decimal, 0.2 once it is rounded to 0.25
    head_hash = unembedding_hash(head.to(torch.bfloat16))
    assert head_hash != unembedding_hash(head)
    assert from_alignment_research(write(tmp_path, parameters, unembed_hash=head_hash), subject) is not None
