"""Training in half precision, and of adapters: what is computed in which dtype and way."""

import numpy as np
import pytest
import torch
from lens_runs import tiny_cache, tiny_lens, tiny_trainer
from tiny_models import tiny_model

from consistency_lens import text_attention
from consistency_lens.adapters import LayerWithAdapter
from consistency_lens.lens_decoder import LensDecoder
from consistency_lens.rounded_weights import FrozenLayer

LORA = {"training": "lora", "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}
CLONES = [{"training": "full"}, {"training": "frozen"}, LORA]


def test_bf16_trains_in_full_precision_weights(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, max_steps=3, bf16=True, stages=["warm_start 1s", "gumbel 1s", "policy_gradient"])
    computed_in, judged_in, score = set(), set(), LensDecoder.score
    trainer.lens.encoder.output_map.register_forward_hook(lambda module, inputs, output: computed_in.add(output.dtype))

    def recorded(decoder, *args):
        text = score(decoder, *args)
        if decoder is not trainer.lens.decoder:
            judged_in.add(text.logits.dtype)
        return text

    monkeypatch.setattr(LensDecoder, "score", recorded)
    trainer.train()
    assert torch.bfloat16 in computed_in  # the passes that carry gradients really ran under autocast
    # the reference, too: at the first step behind warm start it is the decoder itself, but for the rounding of its
    # whole text against that of token after token, which is the CPU's own
    assert judged_in == {torch.bfloat16}
    assert trainer.state.log_history[1]["lm"] == pytest.approx(0, abs=1e-4)
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in trainer.lens.trained_tensors().values())


@pytest.mark.parametrize("half", [True, False])
def test_layers_of_a_step_run_with_their_adapters_and_frozen_ones_are_rounded_once(tmp_path, monkeypatch, half):
    ran = set()
    for kind in (LayerWithAdapter, FrozenLayer):
        call = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda self, inputs, call=call: ran.add(type(self)) or call(self, inputs)
        )
    trainer = tiny_trainer(tmp_path, max_steps=1, bf16=half, lens_settings=LORA, stages=["gumbel"], lm_weight="0")
    trainer.train()
    assert ran == ({LayerWithAdapter, FrozenLayer} if half else {LayerWithAdapter})


@pytest.mark.parametrize("half", [True, False])
def test_adapters_are_left_to_autocast_in_training(tmp_path, half):
    trainer = tiny_trainer(tmp_path, max_steps=1, bf16=half, lens_settings=LORA, stages=["gumbel"], lm_weight="0")
    layer = next(module for module in trainer.lens.modules() if hasattr(module, "cast_input_dtype_enabled"))
    seen = set()
    layer.register_forward_hook(lambda *_: seen.add(layer.cast_input_dtype_enabled))
    trainer.train()
    assert seen == {not half} and layer.cast_input_dtype_enabled


def test_texts_of_adapters_over_a_bfloat16_subject_attend_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(text_attention, "_works", {})  # whether the model can is tried in the step itself
    passes, call = [], text_attention.TextPasses.__call__
    monkeypatch.setattr(
        text_attention.TextPasses, "__call__", lambda *args, **how: passes.append(1) or call(*args, **how)
    )
    model = tiny_model("llama").bfloat16()
    trainer = tiny_trainer(
        tmp_path, model=model, max_steps=1, bf16=True, lens_settings=LORA, stages=["gumbel"], lm_weight="0"
    )
    trainer.train()
    assert list(text_attention._works.values()) == [True]
    assert len(passes) == 2 + trainer.lens.config.num_text_tokens - 1  # two of the trial


@pytest.mark.parametrize("half", [True, False])
def test_what_text_is_held_close_to_keeps_the_way_of_its_adapters(tmp_path, half):
    trainer = tiny_trainer(tmp_path, max_steps=2, bf16=half, lens_settings=LORA, stages=["warm_start 1s", "gumbel"])
    trainer.train()
    layers = [m for m in trainer.lm_reference().decoder.modules() if hasattr(m, "cast_input_dtype_enabled")]
    assert layers and all(layer.cast_input_dtype_enabled for layer in layers)


def test_a_lens_that_bf16_trained_says_the_same_when_it_is_loaded_again(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, bf16=True, stages=["warm_start"])
    trainer.train()
    trainer.save_model()
    lens = trainer.lens.eval()
    loaded = type(lens).from_pretrained(trainer.args.output_dir, base_model=lens.subject.model)
    read = torch.tensor(np.stack([row["activation"] for row in trainer.eval_dataset]))
    ids = lens.decode_ids(read)
    assert torch.equal(ids, loaded.decode_ids(read))
    assert torch.equal(lens.read_ids(ids), loaded.read_ids(ids))


def test_a_bfloat16_subject_trains_float32_tensors(tmp_path):
    for clones in CLONES:
        subject, tokenizer, cache = tiny_cache(tmp_path / clones["training"])
        subject.model.bfloat16()
        lens = tiny_lens(subject, tokenizer, cache, **clones)
        assert {p.dtype for p in lens.parameters() if p.requires_grad} == {torch.float32}
