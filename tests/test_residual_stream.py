"""Capture, replacement, early stop and truncation, over every family of tiny models."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, GEMMA, NUM_LAYERS, UNUSUAL, VOCAB_SIZE, WIDTH, random_tokens, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

from consistency_lens.residual_stream import ResidualStream, gather_positions, truncated

LAYERS = range(NUM_LAYERS)
POSITIONS = torch.tensor([[3, 0, 9], [6, 2, 5]])


@pytest.fixture(scope="module", params=[*FAMILIES, "lfm2", "llama4"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def inputs():
    input_ids, attention_mask = random_tokens(10, 7)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, use_cache=False, **kwargs)


class TestLayout:
    def test_finds_the_parts(self, model):
        stream = ResidualStream(model)
        assert (stream.num_layers, stream.width) == (NUM_LAYERS, WIDTH)
        assert stream.unembedding is model.get_output_embeddings()
        assert stream.input_embedding is model.get_input_embeddings()

    def test_final_norm_and_unembedding_turn_the_last_block_into_logits(self, model, inputs):
        stream = ResidualStream(model)
        with stream.capture(NUM_LAYERS - 1) as captured:
            logits = run(model, inputs).logits
        with torch.no_grad():
            decoded = stream.unembedding(stream.final_norm(captured.activations))
        cap = getattr(model.config, "final_logit_softcapping", None)
        torch.testing.assert_close(cap * torch.tanh(decoded / cap) if cap else decoded, logits)

    def test_embedding_scale_is_what_the_embedding_layer_multiplies_by(self, model):
        stream = ResidualStream(model)
        ids = torch.arange(3, VOCAB_SIZE)
        scaled = stream.embedding_scale * stream.input_embedding.weight[ids]
        torch.testing.assert_close(scaled, stream.input_embedding(ids), rtol=1e-6, atol=0)

    def test_explicit_paths(self, llama):
        stream = ResidualStream(llama, blocks="model.layers", final_norm="model.norm")
        assert stream.blocks is llama.model.layers
        assert stream.final_norm is llama.model.norm

    def test_no_final_norm(self):
        assert ResidualStream(tiny_model("opt", do_layer_norm_before=False)).final_norm is None

    def test_unknown_layout_names_the_argument(self, llama):
        odd = copy.deepcopy(llama)
        odd.model.layers = nn.Sequential(*odd.model.layers)
        with pytest.raises(ValueError, match="num_hidden_layers=3 blocks under LlamaModel.*blocks='...'"):
            ResidualStream(odd)

    def test_wrong_path_lists_the_children(self, llama):
        with pytest.raises(ValueError, match="blocks='model.block' names no module.*lm_head"):
            ResidualStream(llama, blocks="model.block")

    @pytest.mark.parametrize("layer", [-1, NUM_LAYERS])
    def test_layer_out_of_range(self, llama, layer):
        with pytest.raises(ValueError, match=rf"0\.\.2.*got {layer}"):
            ResidualStream(llama).check_layer(layer)


class TestCapture:
    def test_equals_hidden_states(self, model, inputs):
        expected = run(model, inputs, output_hidden_states=True).hidden_states
        for layer in range(NUM_LAYERS - 1):
            with ResidualStream(model).capture(layer) as captured:
                run(model, inputs)
            assert torch.equal(captured.activations, expected[layer + 1])

    def test_stop_runs_no_later_block(self, model, inputs):
        stream = ResidualStream(model)
        ran = []
        handles = [
            block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
            for index, block in enumerate(stream.blocks)
        ]
        with stream.capture(1, stop=True) as stopped:
            run(model, inputs)
        assert ran == [0, 1]
        for handle in handles:
            handle.remove()
        with stream.capture(1) as captured:
            run(model, inputs)
        assert torch.equal(stopped.activations, captured.activations)

    def test_inner_capture_does_not_swallow_the_outer_stop(self, llama, inputs):
        stream = ResidualStream(llama)
        with stream.capture(1, stop=True) as outer, stream.capture(0) as inner:
            run(llama, inputs)
            pytest.fail("the forward pass was not stopped")
        assert not torch.equal(outer.activations, inner.activations)

    def test_hooks_are_gone_after_an_error(self, llama, inputs):
        stream = ResidualStream(llama)
        with pytest.raises(RuntimeError, match="boom"), stream.capture(1, stop=True):
            raise RuntimeError("boom")
        assert run(llama, inputs).logits.shape[-1] == VOCAB_SIZE

    def test_unread_before_the_model_ran(self, llama):
        with ResidualStream(llama).capture(1) as captured, pytest.raises(ValueError, match="block 1 has not run"):
            _ = captured.activations


class TestReplace:
    @pytest.mark.parametrize("layer", LAYERS)
    def test_by_itself_is_bit_identical(self, model, inputs, layer):
        stream = ResidualStream(model)
        with stream.capture(layer) as captured:
            logits = run(model, inputs).logits
        with stream.replace(layer, POSITIONS, gather_positions(captured.activations, POSITIONS)):
            replaced = run(model, inputs).logits
        assert torch.equal(replaced, logits)

    @pytest.mark.parametrize("family", UNUSUAL)
    def test_unusual_families_by_themselves_are_bit_identical(self, family, inputs):
        self.test_by_itself_is_bit_identical(tiny_model(family), inputs, 1)

    def test_several_streams_in_one_are_refused(self, inputs):
        several = {"altup_num_inputs": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE}
        config = Gemma3nTextConfig(**GEMMA, **several, num_kv_shared_layers=1, activation_sparsity_pattern=[0.0] * 3)
        model = AutoModelForCausalLM.from_config(config).eval()
        with pytest.raises(ValueError, match="Gemma3nForCausalLM hand on .*, not one residual stream"):
            with ResidualStream(model).capture(1):
                run(model, inputs)

    def test_reaches_its_position_and_the_later_ones_only(self, model, inputs):
        positions = torch.tensor([[4], [4]])
        with ResidualStream(model).replace(0, positions, torch.randn(2, 1, WIDTH)):
            replaced = run(model, inputs).logits
        changed = (replaced - run(model, inputs).logits).abs().amax(-1) > 1e-4
        assert changed[:, :4].sum() == 0
        assert changed[0, 4:].all()

    def test_last_block_sees_the_replacement_exactly(self, model, inputs):
        stream = ResidualStream(model)
        new = torch.randn(2, 3, WIDTH)
        with stream.replace(1, POSITIONS, new), stream.capture(1) as captured:
            run(model, inputs)
        assert torch.equal(gather_positions(captured.activations, POSITIONS), new)

    def test_gradient_flows_to_the_activations_alone(self, llama, inputs):
        new = torch.randn(2, 3, WIDTH, requires_grad=True)
        stream = ResidualStream(llama)
        with stream.replace(1, POSITIONS, new), stream.select_positions(POSITIONS):
            gradient = torch.autograd.grad(llama(**inputs).logits.square().sum(), new)[0]
        assert gradient.abs().amax(-1).min() > 0

    @pytest.mark.parametrize("layer", [-1, NUM_LAYERS])
    def test_layer_out_of_range(self, llama, layer):
        new = ResidualStream(llama).replace(layer, POSITIONS, torch.randn(2, 3, WIDTH))
        with pytest.raises(ValueError, match=rf"got {layer}"), new:
            pass

    def test_shapes_that_do_not_fit(self, llama):
        with (
            pytest.raises(ValueError, match=r"\(B, K, 32\), got \(2, 3\) and \(2, 3, 31\)"),
            ResidualStream(llama).replace(1, POSITIONS, torch.randn(2, 3, WIDTH - 1)),
        ):
            pass


def test_select_positions_equals_indexing_the_full_logits(model, inputs):
    with ResidualStream(model).select_positions(POSITIONS):
        selected = run(model, inputs).logits
    assert selected.shape == (2, 3, VOCAB_SIZE)
    torch.testing.assert_close(selected, gather_positions(run(model, inputs).logits, POSITIONS))


class TestTruncated:
    @pytest.mark.parametrize("num_blocks", range(NUM_LAYERS + 1))
    def test_gives_the_raw_output_of_the_last_kept_block(self, model, inputs, num_blocks):
        if num_blocks == 0:
            expected = run(model, inputs, output_hidden_states=True).hidden_states[0]
        else:
            with ResidualStream(model).capture(num_blocks - 1) as captured:
                run(model, inputs)
            expected = captured.activations
        cut = truncated(copy.deepcopy(model), num_blocks)
        assert torch.equal(run(cut, inputs).last_hidden_state, expected)
        assert cut.get_output_embeddings() is None
        assert len(ResidualStream(cut).blocks) == num_blocks

    def test_config_describes_the_cut_model(self, model, inputs):
        clone = copy.deepcopy(model)
        clone.config.use_cache = False
        cut = truncated(clone, 2)
        rebuilt = type(cut)(type(cut.config).from_dict(cut.config.to_dict()))
        assert len(ResidualStream(rebuilt).blocks) == 2

    def test_config_shared_with_the_subject_stays(self):
        subject = tiny_model("gemma3")
        before = subject.config.to_dict()
        clone = copy.deepcopy(subject, {id(subject.config): subject.config})
        cut = truncated(clone, 1)
        assert subject.config.to_dict() == before
        assert all(vars(module).get("config") is not subject.config for module in cut.modules())

    def test_narrow_embeddings(self, inputs):
        model = tiny_model("opt", word_embed_proj_dim=16)
        with ResidualStream(model).capture(1) as captured:
            run(model, inputs)
        assert torch.equal(run(truncated(copy.deepcopy(model), 2), inputs).last_hidden_state, captured.activations)

    @pytest.mark.parametrize("family", UNUSUAL)
    def test_unusual_families(self, family, inputs):
        model = tiny_model(family)
        with ResidualStream(model).capture(1) as captured:
            run(model, inputs)
        cut = truncated(copy.deepcopy(model), 2)
        assert torch.equal(run(cut, inputs).last_hidden_state, captured.activations)

    def test_too_many_blocks(self, llama):
        with pytest.raises(ValueError, match=r"0\.\.3.*got 4"):
            truncated(copy.deepcopy(llama), 4)
