"""Clones of the subject, prompts, LoRA settings, and artifacts: what is saved, what comes back, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lenses import INJECTED, LAYER, LORA_TARGETS, activations, disturb, keys, tiny_lens, tiny_tokenizer, trainable
from tiny_models import FAMILIES, GEMMA, VOCAB_SIZE, WIDTH, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, Gemma4TextConfig, PreTrainedModel, RwkvConfig

import consistency_lens
from consistency_lens import ConsistencyLensModel, LensDecoder, LensEncoder
from consistency_lens.lens_clone import clone_subject, encode_prompt, without_dropout

TRAININGS = ("full", "lora", "frozen")
WEIGHTS = "model.safetensors"
TEXTS = ["w9 w10 w11", "w12"]
# Run in a process that has never seen the lens: argv is the folder of the lenses, then the file for what they say.
READ_LENSES = """
import sys
from contextlib import nullcontext
from pathlib import Path
import consistency_lens
from safetensors.torch import load_file, save_file
from transformers import AutoModel
root, found = Path(sys.argv[1]), {}
activations = load_file(root / "activations.safetensors")["activations"]
for folder in sorted(path for path in root.iterdir() if path.name.startswith("lens_")):
    lens = AutoModel.from_pretrained(folder)
    decoded = lens.decode(activations)
    found[f"{folder.name}.ids"] = decoded.token_ids
    found[f"{folder.name}.reconstruction"] = lens.encode(decoded.texts)
save_file(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def subject_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("subject")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def subject(subject_folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(subject_folder)


def new_lens(subject: PreTrainedModel, training: str, **arguments) -> ConsistencyLensModel:
    """A lens whose every trained tensor has moved away from its start."""
    if training == "lora":
        pytest.importorskip("peft")
        arguments.setdefault("lora", {"r": 2, "target_modules": LORA_TARGETS["llama"]})
    torch.manual_seed(0)  # LoRA starts at random
    lens = ConsistencyLensModel.from_subject(
        subject, tiny_tokenizer(), LAYER, num_text_tokens=4, training=training, **{**INJECTED, **arguments}
    )
    lens.set_statistics(torch.linspace(-1, 1, WIDTH), 1.7)
    return disturb(lens).eval()


@pytest.fixture(scope="module")
def artifacts(subject, tmp_path_factory) -> Path:
    """A folder with `lens_<training>` for each way to train, and the activations that tests read with them."""
    root = tmp_path_factory.mktemp("artifacts")
    save_file({"activations": activations()}, root / "activations.safetensors")
    for training in TRAININGS:
        lens = new_lens(subject, training)
        lens.provenance = {"training": training}
        lens.save_pretrained(root / f"lens_{training}")
    return root


def assert_same_readings(first: ConsistencyLensModel, second: ConsistencyLensModel) -> None:
    texts = [lens.decode(activations(), keys=keys()).texts for lens in (first, second)]
    assert texts[0] == texts[1]
    assert torch.equal(first.encode(texts[0]), second.encode(texts[0]))


class TestCloneSubject:
    @pytest.mark.parametrize("share", [True, False])
    def test_is_another_tree_with_the_same_logits(self, share):
        model = tiny_model("llama")
        clone = clone_subject(model, share_weights=share)
        ids = torch.tensor([[1, 5, 9]])
        assert torch.equal(clone(ids).logits, model(ids).logits)
        assert clone.model.layers[0] is not model.model.layers[0]
        assert (clone.lm_head.weight is model.lm_head.weight) == share

    @pytest.mark.parametrize("share", [True, False])
    def test_tied_weights_stay_tied(self, share):
        clone = clone_subject(tiny_model("llama", tie_word_embeddings=True), share_weights=share)
        assert clone.lm_head.weight is clone.model.embed_tokens.weight

    @pytest.mark.parametrize("family", FAMILIES)
    def test_without_dropout_train_mode_is_eval_mode(self, family):
        config = tiny_model(family).config.to_dict()
        rates = {name: 0.5 for name, value in config.items() if "drop" in name and isinstance(value, float)}
        model = tiny_model(family, **rates)
        ids = torch.tensor([[1, 5, 9, 4, 8]])
        expected = model(ids).logits
        clone = without_dropout(clone_subject(model, share_weights=True)).train()
        torch.testing.assert_close(clone(ids).logits, expected)
        if rates:
            assert not torch.allclose(model.train()(ids).logits, expected), "the subject keeps its dropout"


@pytest.mark.parametrize("size", [8, 0])
def test_a_model_that_looks_tokens_up_in_every_block_is_refused(size):
    config = Gemma4TextConfig(
        **{**GEMMA, "hidden_size_per_layer_input": size, "vocab_size_per_layer_input": VOCAB_SIZE},
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )
    model, tokenizer = AutoModelForCausalLM.from_config(config), tiny_tokenizer()
    if size == 0:
        assert len(ConsistencyLensModel.from_subject(model, tokenizer, LAYER).explain("w9 w10")) == 2
        return
    with pytest.raises(ValueError, match="each block of Gemma4ForCausalLM looks the tokens up in a table of its own"):
        ConsistencyLensModel.from_subject(model, tokenizer, LAYER)


def test_weights_that_a_model_rewrites_are_not_shared():
    config = RwkvConfig(vocab_size=VOCAB_SIZE, hidden_size=WIDTH, num_hidden_layers=4, rescale_every=2)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="RwkvForCausalLM rewrites its weights in place.*set training to full"):
        clone_subject(model, share_weights=True)
    assert clone_subject(model, share_weights=False) is not model


class TestPrompt:
    def test_is_cut_at_its_slot_behind_bos(self):
        assert encode_prompt("w3 w4 <embed> w5", "<embed>", tiny_tokenizer()) == ([1, 3, 4], [5])

    def test_without_bos_token_it_starts_with_its_words(self):
        assert encode_prompt("<embed>", "<embed>", tiny_tokenizer(bos=False)) == ([], [])

    @pytest.mark.parametrize("trainable_prompt", [True, False])
    def test_starts_from_the_embeddings_of_its_tokens(self, trainable_prompt):
        lens = tiny_lens("gemma3", **INJECTED, trainable_prompt=trainable_prompt)
        table = lens.decoder.base.get_input_embeddings()
        prefix, suffix = lens.decoder.prompt()
        assert torch.equal(prefix, table(torch.tensor([1, 3, 4])))
        assert torch.equal(suffix, table(torch.tensor([5, 6])))
        assert ("decoder.prefix_embeddings" in trainable(lens)) == trainable_prompt


class TestSaving:
    @pytest.mark.parametrize("training", TRAININGS)
    def test_holds_the_trained_tensors_and_little_else(self, artifacts, subject, training):
        lens = new_lens(subject, training)
        folder = artifacts / f"lens_{training}"
        names = set(load_file(folder / WEIGHTS))
        statistics = {f"{part}.normaliser.{name}" for part in ("decoder", "encoder") for name in ("mean", "rms")}
        assert names == set(trainable(lens)) | statistics
        trained_bytes = sum(parameter.nbytes for parameter in trainable(lens).values())
        assert (folder / WEIGHTS).stat().st_size < 1.5 * trained_bytes

    def test_holds_no_pickle(self, artifacts):
        files = [path for path in artifacts.rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}
        assert json.loads((artifacts / "lens_full" / "provenance.json").read_text()) == {"training": "full"}

    def test_holds_tied_weights_once(self, tmp_path):
        model = tiny_model("llama", tie_word_embeddings=True)
        lens = new_lens(model, "full")
        lens.save_pretrained(tmp_path)
        names = [name for name in load_file(tmp_path / WEIGHTS) if "embed_tokens" in name or "lm_head" in name]
        assert sorted(names) == ["decoder.base.model.embed_tokens.weight", "encoder.base.embed_tokens.weight"]
        loaded = AutoModel.from_pretrained(tmp_path)
        assert loaded.decoder.base.lm_head.weight is loaded.decoder.base.model.embed_tokens.weight
        assert_same_readings(loaded, lens)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_broken_tensors_are_refused_and_nothing_is_written(self, subject, tmp_path, value):
        lens = new_lens(subject, "frozen")
        with torch.no_grad():
            lens.decoder.projection.weight[3, 3] = value
        with pytest.raises(
            ValueError, match="1 tensors hold NaN or infinity .*decoder.projection.weight.*nothing written"
        ):
            lens.save_pretrained(tmp_path / "lens")
        assert not (tmp_path / "lens").exists()

    def test_gathered_tensors_take_the_place_of_the_lenss_own(self, subject, tmp_path):
        lens = new_lens(subject, "frozen")
        gathered = {name: torch.full_like(tensor, 0.5) for name, tensor in lens.trained_tensors().items()}
        lens.save_pretrained(tmp_path, state_dict=gathered)
        assert all((tensor == 0.5).all() for tensor in load_file(tmp_path / WEIGHTS).values())

    def test_other_processes_write_nothing(self, subject, tmp_path):
        new_lens(subject, "frozen").save_pretrained(tmp_path / "lens", is_main_process=False)
        assert not (tmp_path / "lens").exists()


class TestLoading:
    @pytest.mark.parametrize("training", TRAININGS)
    def test_the_loaded_lens_reads_the_same(self, artifacts, subject, training):
        lens, loaded = new_lens(subject, training), AutoModel.from_pretrained(artifacts / f"lens_{training}")
        assert type(loaded) is ConsistencyLensModel and not loaded.training
        assert set(trainable(loaded)) == set(trainable(lens))
        assert_same_readings(loaded, lens)
        assert str(loaded.explain("w9 w10")) == str(lens.explain("w9 w10"))
        assert loaded.provenance == {"training": training}

    def test_another_process_reads_the_same(self, artifacts, subject, tmp_path):
        pytest.importorskip("peft")
        arguments = [sys.executable, "-c", READ_LENSES, str(artifacts), str(tmp_path / "found.safetensors")]
        environment = {**os.environ, "PYTHONPATH": str(Path(consistency_lens.__file__).parents[1])}
        subprocess.run(arguments, check=True, cwd=tmp_path, env=environment, timeout=300)
        found = load_file(tmp_path / "found.safetensors")
        for training in TRAININGS:
            lens = new_lens(subject, training)
            decoded = lens.decode(activations())
            assert torch.equal(found[f"lens_{training}.ids"], decoded.token_ids)
            torch.testing.assert_close(
                found[f"lens_{training}.reconstruction"], lens.encode(decoded.texts), rtol=0, atol=1e-6
            )

    @pytest.mark.parametrize("training", TRAININGS)
    @pytest.mark.parametrize("part", ["decoder", "encoder"])
    def test_decoder_and_encoder_load_alone(self, subject, tmp_path, training, part):
        clone = getattr(new_lens(subject, training), part)
        clone.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert type(loaded) is {"decoder": LensDecoder, "encoder": LensEncoder}[part]
        ids = torch.tensor([[9, 10, 11]])
        arguments = (activations(1), ids) if part == "decoder" else (clone.embed_ids(ids),)
        assert torch.equal(loaded(*arguments), clone(*arguments))

    @pytest.mark.parametrize("training", ["lora", "frozen"])
    def test_base_model_takes_the_place_of_the_one_named(self, artifacts, subject_folder, training):
        pytest.importorskip("peft")
        folder = artifacts / f"lens_{training}"
        other = tiny_model("llama", seed=1)
        loaded = ConsistencyLensModel.from_pretrained(folder, base_model=other)
        assert loaded.subject.model is other
        assert loaded.decoder.base.lm_head.weight is other.lm_head.weight
        by_path = AutoModel.from_pretrained(folder, base_model=str(subject_folder))
        assert_same_readings(by_path, AutoModel.from_pretrained(folder))

    def test_loaded_clones_share_the_subjects_weights(self, artifacts):
        loaded = AutoModel.from_pretrained(artifacts / "lens_frozen")
        own = {parameter.data_ptr() for parameter in loaded.subject.model.parameters()}
        assert {parameter.data_ptr() for parameter in loaded.decoder.base.parameters()} == own

    @pytest.mark.parametrize("training", ["full", "frozen"])
    def test_dtype_is_that_of_the_base(self, artifacts, training):
        loaded = AutoModel.from_pretrained(artifacts / f"lens_{training}", dtype=torch.bfloat16)
        assert {p.dtype for p in loaded.decoder.base.parameters()} == {torch.bfloat16}
        assert loaded.decode(activations()).token_ids.shape == (3, 4)

    def test_a_full_lens_has_dropout_off_after_loading(self, tmp_path):
        model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
        lens = ConsistencyLensModel.from_subject(model, tiny_tokenizer(), LAYER, training="full")
        lens.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path).train()
        assert torch.equal(loaded.encode(TEXTS), loaded.encode(TEXTS))

    @pytest.mark.parametrize("change", ["missing", "unexpected"])
    def test_other_tensors_than_the_configurations_are_refused(self, subject, tmp_path, change):
        new_lens(subject, "frozen").save_pretrained(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        name = "decoder.projection.weight"
        if change == "missing":
            del tensors[name]
        else:
            tensors["decoder.stranger"] = torch.zeros(2)
        save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"1 (tensors )?{change} \['decoder\.(projection\.weight|stranger)'\]"):
            AutoModel.from_pretrained(tmp_path)

    def test_a_tensor_of_another_shape_is_refused(self, subject, tmp_path):
        new_lens(subject, "frozen").save_pretrained(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        tensors["encoder.output_map.bias"] = torch.zeros(WIDTH + 1)
        save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
        with pytest.raises(ValueError, match="encoder.output_map.bias has shape .*another subject"):
            AutoModel.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        "family, overrides, message",
        [
            ("llama", {"num_hidden_layers": 4}, "num_hidden_layers is 4, the lens was made for 3"),
            ("llama", {"vocab_size": 101}, "vocab_size is 101, the lens was made for 97"),
            ("llama", {"hidden_size": 64}, "hidden_size is 64, the lens was made for 32"),
            ("mistral", {}, "model_type is 'mistral', the lens was made for 'llama'"),
        ],
    )
    def test_another_subject_is_refused(self, artifacts, family, overrides, message):
        with pytest.raises(ValueError, match=message):
            ConsistencyLensModel.from_pretrained(artifacts / "lens_frozen", base_model=tiny_model(family, **overrides))

    def test_a_subject_that_is_gone_is_named(self, tmp_path):
        folder = tmp_path / "subject"
        tiny_model("llama").save_pretrained(folder)
        new_lens(AutoModelForCausalLM.from_pretrained(folder), "frozen").save_pretrained(tmp_path / "lens")
        folder.rename(tmp_path / "moved")
        with pytest.raises(ValueError, match="no model at .*subject.*pass base_model="):
            AutoModel.from_pretrained(tmp_path / "lens")
        assert AutoModel.from_pretrained(tmp_path / "lens", base_model=str(tmp_path / "moved")).config.layer == LAYER

    def test_a_subject_without_a_name_is_asked_for(self, tmp_path):
        new_lens(tiny_model("llama"), "frozen").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="pass base_model="):
            AutoModel.from_pretrained(tmp_path)

    def test_a_fully_trained_lens_cannot_be_quantised(self, artifacts):
        with pytest.raises(ValueError, match="neither quantised nor spread over devices"):
            ConsistencyLensModel.from_pretrained(artifacts / "lens_full", quantization_config={"load_in_8bit": True})
