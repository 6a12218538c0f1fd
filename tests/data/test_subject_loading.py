import pytest
import torch
from tiny_lenses import tiny_tokenizer
from tiny_models import NUM_LAYERS, random_tokens, tiny_model
from transformers import AutoModelForCausalLM

from consistency_lens import attention
from consistency_lens.data import subject_loading
from consistency_lens.data.cache_building import build_activation_cache
from consistency_lens.data.corpus import corpus_from_rows
from consistency_lens.data.subject_loading import load_subject_and_tokenizer, pinned_revision
from consistency_lens.fingerprints import weights_hash
from consistency_lens.subject import Subject


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    # bitsandbytes reads its 4-bit blocks of 64 wrongly on a CPU where a row is no multiple of them
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def gemma2(tmp_path):
    """An architecture whose attention has a soft-cap."""
    tiny_model("gemma2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_subject_is_frozen_in_evaluation_mode_and_in_its_dtype(folder, dtype):
    subject = load_subject_and_tokenizer(folder, dtype=dtype)
    assert {parameter.dtype for parameter in subject.model.parameters()} == {getattr(torch, dtype)}
    assert not subject.model.training
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    assert subject.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert subject.revision is None


@pytest.mark.parametrize("place", [{"device": "cpu"}, {"device_map": "auto"}, {"device": torch.device("cpu")}])
def test_a_subject_goes_where_it_is_told(folder, place):
    if place == {"device_map": "auto"} and torch.cuda.is_available():
        pytest.skip("auto takes the GPU")
    subject = load_subject_and_tokenizer(folder, **place)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, mask = random_tokens(9, 6)
    with torch.no_grad():
        assert torch.equal(subject.model(ids, mask).logits, expected(ids, mask).logits)


def test_the_attention_that_is_taken_is_said_once(folder, caplog):
    caplog.set_level("INFO")
    load_subject_and_tokenizer(folder)
    load_subject_and_tokenizer(folder, attention="eager")
    said = [record.message for record in caplog.records if record.message.startswith("attention of")]
    assert [message.split(": ")[1] for message in said] == ["sdpa", "eager"]


def test_flash_attention_is_tried_and_left_where_the_architecture_has_none(folder, monkeypatch):
    asked, load = [], AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments, attn_implementation, **keywords):
        asked.append(attn_implementation)
        if attn_implementation is not None:
            raise ValueError("LlamaForCausalLM does not support Flash Attention 2 yet")
        return load(*arguments, attn_implementation=attn_implementation, **keywords)

    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(subject_loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_subject_and_tokenizer(folder, dtype="bfloat16", device_map="auto")
    assert asked == ["flash_attention_2", None]
    asked.clear()
    load_subject_and_tokenizer(folder, dtype="float32", device_map="auto")
    load_subject_and_tokenizer(folder, dtype="bfloat16", device="cpu")
    assert asked == [None, None]


def test_an_attention_that_is_asked_for_is_taken(folder):
    assert load_subject_and_tokenizer(folder, attention="eager").model.config._attn_implementation == "eager"


def test_attention_is_left_to_transformers_where_sdpa_is_missing(gemma2):
    model = load_subject_and_tokenizer(gemma2).model
    ids, mask = random_tokens(9)
    assert model(ids, mask).logits.isfinite().all()


def relative_error(found, expected):
    return ((found.float() - expected).norm() / expected.norm()).item()


def logits(model):
    with torch.no_grad():
        return model(*random_tokens(20)).logits


def test_8bit_weights_give_nearly_the_same_logits(folder):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = load_subject_and_tokenizer(folder, quantization="8bit", device="cpu").model
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)]
    assert len(layers) == 7 * NUM_LAYERS
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert relative_error(logits(model), logits(expected)) < 0.1


def test_4bit_weights_are_the_nearest_of_nf4_and_are_used_as_they_stand(folder):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = load_subject_and_tokenizer(folder, quantization="4bit", device="cpu").model
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 7 * NUM_LAYERS
    for name, layer in layers.items():
        kept = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        weight = expected.get_submodule(name).weight
        # half the widest gap between two of the 16 values, of the largest weight of each block of 64
        largest = weight.detach().reshape(-1, 64).abs().amax(1, keepdim=True)
        assert ((kept - weight).reshape(-1, 64).abs() <= 0.153 * largest).all()
        weight.data.copy_(kept)
    assert relative_error(logits(model), logits(expected)) < 1e-5


def test_8bit_weights_do_not_say_at_every_pass_that_they_take_float16(folder, caplog):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = load_subject_and_tokenizer(folder, quantization="8bit", device="cpu").model
    logits(model)
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes.autograd")]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_cache_of_a_quantised_subject_holds_its_hidden_states(folder, tmp_path, quantization):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = load_subject_and_tokenizer(folder, quantization=quantization, device="cpu").model
    corpus = corpus_from_rows([{"input_ids": range(3, 3 + size), "document": size} for size in (20, 30, 40)])
    arguments = {"tokenizer": tiny_tokenizer(), "subject_name": "tiny", "dataset_name": "counting", "progress": False}
    cache = build_activation_cache(Subject(model, 1), corpus, tmp_path, dtype="float32", batch_size=1, **arguments)
    loaded_as = cache.provenance["loaded_as"]
    assert loaded_as["quantization"][f"load_in_{quantization}"]
    assert cache.provenance["weights_hash"] == weights_hash(model)
    for row in cache.dataset:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
        found = torch.tensor(row["activation"])
        assert relative_error(found, output.hidden_states[2][0, row["position"]].float()) < 0.02


def test_gradients_pass_4bit_weights_after_a_pass_without(folder):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    model = load_subject_and_tokenizer(folder, dtype="bfloat16", quantization="4bit", device="cpu").model
    ids, _ = random_tokens(8)
    with torch.no_grad():
        model(ids)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.float().square().sum().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "auto"}, "dtype must be one of float32, bfloat16, float16, got 'auto'"),
        ({"quantization": "2bit"}, "quantization must be one of 8bit, 4bit, got '2bit'"),
        ({"device": "cuda:99"}, "device: got 'cuda:99', which is not to be had here; try cpu"),
        ({"device": "nowhere"}, "device: got 'nowhere', which is not to be had here"),
        ({"device": "cpu", "device_map": "auto"}, "device: got 'cpu' and device_map 'auto'; pass one of them"),
        ({"attention": "wishful"}, "with attention 'wishful'; set attention to auto"),
        (
            {"attention": "flash_attention_2", "dtype": "bfloat16"},
            "attention: flash_attention_2 takes bfloat16 or float16 on a GPU, got bfloat16 on a CPU; set attention to",
        ),
        ({"attention": "flash_attention_2", "device_map": "auto"}, "takes bfloat16 or float16 on a GPU, got float32;"),
        ({"device_map": "wishful"}, "cannot load .*device_map"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(folder, arguments, message):
    with pytest.raises(ValueError, match=message) as failed:
        load_subject_and_tokenizer(folder, **arguments)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("what", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_folder_that_lacks_a_part_is_named(folder, tmp_path, what):
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for file in tmp_path.glob("tokenizer*.json" if what == "tokenizer.json" else what):
        file.unlink()
    with pytest.raises(
        ValueError, match="model: cannot load .*; pass a Hub id or a folder with a causal LM"
    ) as failed:
        load_subject_and_tokenizer(str(tmp_path))
    assert "\n" not in str(failed.value)


def test_an_unknown_id_is_named():
    with pytest.raises(ValueError, match="model: cannot load 'no/such'; pass a Hub id"):
        pinned_revision("no/such")


def test_a_model_that_does_not_fit_the_device_is_named(folder, monkeypatch):
    def full(*_arguments, **_keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14 GiB\nand more")

    monkeypatch.setattr(subject_loading.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ValueError, match=r"does not fit the device \(CUDA out of memory.*--device_map auto") as failed:
        load_subject_and_tokenizer(folder)
    assert "\n" not in str(failed.value)


def test_a_masked_language_model_is_refused_once_it_is_loaded(tmp_path):
    tiny_model("roberta", is_decoder=False).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="see those behind them, got .*; pass a causal LM"):
        load_subject_and_tokenizer(str(tmp_path))


def test_quantisation_without_bitsandbytes_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r'quantization 8bit needs .*pip install "consistency-lens\[quant\]"'):
        load_subject_and_tokenizer(folder, quantization="8bit")
