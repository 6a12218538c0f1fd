"""The vLLM engine: against a stand-in that runs what it is handed through transformers, and against vLLM itself."""

import sys
from types import SimpleNamespace

import pytest
import torch
from lens_runs import tiny_cache
from lens_runs import tiny_lens as tiny_cache_lens
from tiny_lenses import PROMPTS, activations, disturb, tiny_lens
from transformers import AutoModelForCausalLM, GenerationConfig

from consistency_lens.data.activation_source import ActivationRows
from consistency_lens.evaluation.explaining import explain_dataset
from consistency_lens.evaluation.vllm_engine import VllmEngine, merged_base

BATCH = 12
# its attention takes no heads of fewer dimensions
ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}


class StandIn:
    """Does what `vllm.LLM` does with these settings, one prompt after the other."""

    def __init__(self, model, enable_prompt_embeds, skip_tokenizer_init, **settings):
        assert enable_prompt_embeds and skip_tokenizer_init
        self.model, loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, settings.pop("dtype")), output_loading_info=True
        )
        assert not any(loaded.values()), "tensors are missing or left over"
        self.length = settings.pop("max_model_len")
        assert settings.pop("disable_log_stats") is True
        if settings:
            raise TypeError(f"LLM got an unexpected keyword argument {next(iter(settings))}")

    def generate(self, requests, sampling, use_tqdm):
        assert use_tqdm is False and sampling.temperature == 0 and sampling.ignore_eos and not sampling.detokenize
        return [SimpleNamespace(outputs=[self.text(request["prompt_embeds"], sampling)]) for request in requests]

    def text(self, prompt, sampling):
        assert len(prompt) + sampling.max_tokens == self.length
        prompt = prompt.to(self.model.dtype)
        embed, ids, found = self.model.get_input_embeddings(), [], []
        while len(ids) < sampling.max_tokens and not set(ids) & set(sampling.stop_token_ids):
            inputs = torch.cat([prompt, embed(torch.tensor(ids, dtype=torch.long))])[None]
            scores = self.model(inputs_embeds=inputs).logits[0, -1].log_softmax(dim=-1)
            ids.append(scores.argmax().item())
            found.append({ids[-1]: SimpleNamespace(logprob=scores[ids[-1]].item())})
        return SimpleNamespace(token_ids=ids, logprobs=found)


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the package."""
    module = SimpleNamespace(LLM=StandIn, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def moved(family="llama", training="frozen", **arguments):
    """A lens whose every trained tensor has moved away from its start."""
    if training == "lora":
        pytest.importorskip("peft")
    return disturb(tiny_lens(family, training, **{**PROMPTS, **arguments}), scale=0.2)


def stop_at_third_token(lens):
    """Makes the third token of the first text the one that ends texts; returns it and which tokens come before."""
    ids = lens.decode(activations(BATCH)).token_ids
    lens.config.decoder.stop_token_id = ids[0, 2].item()
    return ids[0, 2], lens.drawn_mask(ids)


def every_tensor(lens):
    return {id(tensor): tensor for model in (lens, lens.subject.model) for tensor in model.parameters()}


@pytest.mark.parametrize(
    ("family", "training"), [("llama", "frozen"), ("llama", "full"), ("gpt2", "lora"), ("gemma3", "lora")]
)
def test_its_texts_are_those_of_the_lens_which_it_leaves_alone(vllm, family, training):
    lens = moved(family, training)
    before = {key: tensor.detach().clone() for key, tensor in every_tensor(lens).items()}
    expected, found = lens.decode(activations(BATCH)), VllmEngine(lens).decode(activations(BATCH))
    assert found.token_ids.tolist() == expected.token_ids.tolist() and found.texts == expected.texts
    assert len(set(found.texts)) > BATCH // 2, "the texts depend on the activations"
    assert all(torch.equal(tensor, before[key]) for key, tensor in every_tensor(lens).items())


def test_a_text_that_stops_is_filled_with_its_stop_token(vllm):
    lens = moved()
    stop, drawn = stop_at_third_token(lens)
    assert drawn[0].tolist() == [True, True, True, False] and drawn.all(dim=1).any()
    expected, found = lens.decode(activations(BATCH)), VllmEngine(lens).decode(activations(BATCH))
    assert found.token_ids.tolist() == expected.token_ids.where(drawn, stop).tolist()
    assert found.texts == expected.texts


def test_settings_reach_vllm_and_those_that_change_texts_are_in_its_name(vllm):
    assert VllmEngine(moved()).name == "vllm float32"
    assert VllmEngine(moved(), dtype="bfloat16").name == "vllm bfloat16"
    with pytest.raises(ValueError, match="with these settings, TypeError: .* argument gpu_memory"):
        VllmEngine(moved(), gpu_memory=0.5)


def test_a_model_that_computes_something_else_is_refused(vllm):
    class Scaled(StandIn):
        def text(self, prompt, sampling):
            return super().text(3 * prompt, sampling)

    vllm.LLM = Scaled
    with pytest.raises(ValueError, match="nats a token more or less likely than the lens .* LlamaForCausalLM"):
        VllmEngine(moved())


def test_decoders_that_no_plain_model_stands_for_are_refused(vllm):
    with pytest.raises(ValueError, match="the decoder has injection_layers=2"):
        VllmEngine(tiny_lens(injection_layers=2))
    lens = tiny_lens()
    lens.decoder.base.is_quantized = True
    with pytest.raises(ValueError, match="was loaded with quantization_config"):
        VllmEngine(lens)
    lens = tiny_lens()
    lens.decoder.base.lm_head.to("meta")
    with pytest.raises(ValueError, match="are offloaded by its device_map"):
        VllmEngine(lens)


def test_without_vllm_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r'pip install "consistency-lens\[vllm\]"'):
        VllmEngine(tiny_lens())


def test_a_generation_config_that_transformers_does_not_write_is_left_out(tmp_path):
    lens = tiny_lens()
    lens.decoder.base.generation_config = GenerationConfig(temperature=0.9, do_sample=False)
    with pytest.raises(ValueError, match="temperature"):
        lens.decoder.base.save_pretrained(tmp_path)
    merged_base(lens.decoder).save_pretrained(tmp_path)


def test_a_cache_is_explained_by_it(vllm, tmp_path):
    subject, tokenizer, cache = tiny_cache(tmp_path / "cache")
    lens, rows = disturb(tiny_cache_lens(subject, tokenizer, cache)), ActivationRows(cache)
    engine = VllmEngine(lens)
    plain = explain_dataset(lens, rows, tmp_path / "plain", progress=False)
    found = explain_dataset(lens, rows, tmp_path / "vllm", engine=engine, progress=False)
    assert found.to_dict() == plain.to_dict()
    with pytest.raises(ValueError, match="has explanations with engine None, now it is 'vllm float32'"):
        explain_dataset(lens, rows, tmp_path / "plain", engine=engine, progress=False)
    with pytest.raises(ValueError, match="one process, got 2 processes"):
        state = SimpleNamespace(process_index=0, num_processes=2)
        explain_dataset(lens, rows, tmp_path / "two", engine=engine, state=state, progress=False)
    disturb(lens)
    with pytest.raises(ValueError, match="started with other weights than the lens has"):
        explain_dataset(lens, rows, tmp_path / "moved", engine=engine, progress=False)
    assert not (tmp_path / "two").exists() and not (tmp_path / "moved").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "training"), [("llama", "full"), ("gpt2", "lora"), ("gemma3", "lora")])
def test_vllm_itself_writes_the_texts_of_the_lens(monkeypatch, family, training):
    pytest.importorskip("vllm", reason="needs vLLM: pip install 'consistency-lens[vllm]'", exc_type=ImportError)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, where it runs on a CPU
    heads = {key: size for key, size in ONE_HEAD.items() if family != "gpt2" or key == "num_attention_heads"}
    lens = moved(family, training, model=heads, num_text_tokens=8)
    stop, drawn = stop_at_third_token(lens)
    engine = VllmEngine(lens, enforce_eager=True, gpu_memory_utilization=0.1)
    assert engine.difference < 1e-3
    expected, found = (of.decode(activations(BATCH)).token_ids for of in (lens, engine))
    # all but for ties within rounding
    assert (found == expected.where(drawn, stop)).float().mean() >= 0.95
