"""The one-token pass against the plain one: logits and gradients, over architectures, windows and padding."""

import copy
import logging
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from at_once import at_once
from tiny_models import FAMILIES, NUM_LAYERS, WIDTH, random_tokens, tiny_model

from consistency_lens.subject import Subject
from consistency_lens.token_logits import TokenLogits

LAYER = 1
# Sequences are longer than the windows.
WINDOW = {"sliding_window": 6}
ONE_TOKEN_CASES = [
    *((family, {}) for family in FAMILIES if family != "bloom"),
    ("gemma2", WINDOW),
    ("gemma3", WINDOW),
    ("gemma3", {"sliding_window": 6, "attn_implementation": "eager"}),
    ("mistral", WINDOW),
    ("phi3", WINDOW),
    ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}),
    ("qwen3", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 0}),
    ("llama", {"attn_implementation": "eager"}),
]


def ragged_inputs(num_positions: int):
    """Two right-padded rows of 20 and 13 tokens, read at their last token and at earlier ones."""
    positions = torch.tensor([[19, 3, 8], [12, 1, 7]])[:, :num_positions]
    return *random_tokens(20, 13), positions


def kl_and_gradient(replaced_logits, context, activations):
    """KL(p || q) in nats over all positions, and its gradient with respect to the new activations."""
    activations = activations.clone().requires_grad_()
    target = context.logits.float().log_softmax(-1)
    logits = replaced_logits(context, activations).float()
    kl = F.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)
    return kl.detach(), torch.autograd.grad(kl.sum(), activations)[0]


def new_activations(context, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return context.activations + torch.randn(context.activations.shape, generator=generator).to(context.activations)


def assert_equals_full_pass(subject, context):
    activations = new_activations(context)
    kl, gradient = kl_and_gradient(subject.replaced_logits, context, activations)
    expected_kl, expected_gradient = kl_and_gradient(subject.replaced_logits_full, context, activations)
    assert expected_kl.min() > 1e-3
    torch.testing.assert_close(kl, expected_kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


class TestContext:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_activations_and_logits_are_those_of_a_plain_pass(self, family):
        model = tiny_model(family)
        input_ids, attention_mask, positions = ragged_inputs(3)
        with torch.no_grad():
            output = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        context = Subject(model, LAYER).context(input_ids, attention_mask, positions)
        rows = torch.arange(2)[:, None]
        torch.testing.assert_close(context.activations, output.hidden_states[LAYER + 1][rows, positions])
        torch.testing.assert_close(context.logits, output.logits[rows, positions])

    def test_activations_stop_at_the_layer(self):
        subject = Subject(tiny_model("llama"), LAYER)
        input_ids, attention_mask, positions = ragged_inputs(3)
        subject.stream.blocks[LAYER + 1].register_forward_pre_hook(lambda *_: pytest.fail("a later block ran"))
        assert subject.activations(input_ids, attention_mask).shape == (2, 20, WIDTH)

    @pytest.mark.parametrize(
        ("layer", "num_positions", "may_stop", "finished"),
        [(LAYER, 3, True, [3]), (LAYER, 3, False, [20]), (0, 12, True, [20]), (NUM_LAYERS - 1, 3, True, [20])],
    )
    def test_the_last_block_finishes_the_tokens_that_are_read(self, layer, num_positions, may_stop, finished):
        """The context's own only where that is less work, or where the pass may not end early."""
        subject = Subject(tiny_model("llama"), layer)
        subject.stream.may_stop = may_stop
        subject.check_one_token(64)
        seen = []
        subject.stream.blocks[-1].mlp.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
        input_ids, attention_mask = random_tokens(20, 13)
        positions = torch.arange(num_positions).expand(2, -1)
        context = subject.context(input_ids, attention_mask, positions)
        assert seen == finished
        expected = subject.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :num_positions]
        torch.testing.assert_close(context.logits, expected)

    def test_the_self_check_ends_its_pass_early_however_many_blocks_are_above(self):
        subject, seen = Subject(tiny_model("llama", num_hidden_layers=8), 0), []
        subject.stream.blocks[-1].mlp.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
        assert subject.check_one_token(10)
        # the plain pass and the three whole replaced ones; the tokens that are read, as they are and replaced
        assert seen == [16] * 4 + [3, 3]

    def test_freezes_the_model(self):
        model = tiny_model("gpt2").train()
        Subject(model, LAYER)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_layer_out_of_range(self):
        with pytest.raises(ValueError, match=r"0\.\.2.*got 3"):
            Subject(tiny_model("llama"), NUM_LAYERS)

    @pytest.mark.parametrize("positions", [[[19], [13]], [[20], [12]], [[-1], [12]]])
    def test_position_that_is_no_real_token(self, positions):
        input_ids, attention_mask = random_tokens(20, 13)
        with pytest.raises(ValueError, match="indices of real tokens"):
            Subject(tiny_model("llama"), LAYER).context(input_ids, attention_mask, torch.tensor(positions))

    def test_left_padding(self):
        input_ids, attention_mask = (tensor.flip(1) for tensor in random_tokens(20, 13))
        with pytest.raises(ValueError, match="padding_side='right'"):
            Subject(tiny_model("llama"), LAYER).context(input_ids, attention_mask, torch.tensor([[19], [19]]))

    def test_positions_of_the_wrong_shape(self):
        input_ids, attention_mask = random_tokens(20, 13)
        with pytest.raises(ValueError, match=r"\(B, K\) with B=2, got \(2,\)"):
            Subject(tiny_model("llama"), LAYER).context(input_ids, attention_mask, torch.tensor([19, 12]))

    def test_a_mask_of_another_shape(self):
        input_ids, attention_mask = random_tokens(20, 13)
        with pytest.raises(ValueError, match=r"must both be \(B, S\), got \(2, 20\) and \(2, 21\)"):
            longer = torch.nn.functional.pad(attention_mask, (0, 1))
            Subject(tiny_model("llama"), LAYER).context(input_ids, longer, torch.tensor([[19], [12]]))


class TestOneToken:
    @pytest.mark.parametrize("num_positions", [1, 3])
    @pytest.mark.parametrize(("family", "overrides"), ONE_TOKEN_CASES)
    def test_kl_and_gradient_equal_the_full_pass(self, family, overrides, num_positions):
        subject = Subject(tiny_model(family, **overrides), LAYER)
        context = subject.context(*ragged_inputs(num_positions))
        assert context.cache is not None
        assert_equals_full_pass(subject, context)

    @pytest.mark.parametrize("layer", [0, NUM_LAYERS - 1])
    def test_first_and_last_layer(self, layer):
        subject = Subject(tiny_model("gpt_neox"), layer)
        assert_equals_full_pass(subject, subject.context(*ragged_inputs(3)))

    def test_original_activations_give_the_original_logits(self):
        subject = Subject(tiny_model("gemma2"), LAYER)
        context = subject.context(*ragged_inputs(3))
        torch.testing.assert_close(subject.replaced_logits(context, context.activations), context.logits)

    @pytest.mark.parametrize("layer", range(NUM_LAYERS))
    def test_only_blocks_above_the_layer_keep_keys_and_values(self, layer):
        subject = Subject(tiny_model("llama"), layer)
        context = subject.context(*ragged_inputs(3))
        last = NUM_LAYERS - 1  # says which dtype attention runs in
        [kept] = context.cache
        assert [states is not None for states in kept] == [b > layer or b == last for b in range(NUM_LAYERS)]
        length = context.input_ids.shape[1]
        assert all(keys.shape[2] == values.shape[2] == length for keys, values in filter(None, kept))

    def test_context_serves_more_than_once(self):
        subject = Subject(tiny_model("llama"), LAYER)
        context = subject.context(*ragged_inputs(3))
        first = subject.replaced_logits(context, new_activations(context))
        subject.replaced_logits(context, new_activations(context, seed=1))
        assert torch.equal(subject.replaced_logits(context, new_activations(context)), first)

    def test_runs_the_query_tokens_alone(self):
        subject = Subject(tiny_model("llama"), LAYER)
        context = subject.context(*ragged_inputs(3))
        lengths = []
        for block in subject.stream.blocks:
            block.register_forward_hook(lambda _module, _inputs, output: lengths.append(output.shape[1]))
        subject.replaced_logits(context, context.activations)
        assert lengths == [3] * NUM_LAYERS

    def test_no_gradient_work_below_the_layer(self):
        subject = Subject(tiny_model("llama"), LAYER)
        context = subject.context(*ragged_inputs(1))
        needs_grad = []
        for block in subject.stream.blocks:
            block.mlp.register_forward_hook(lambda _module, _inputs, output: needs_grad.append(output.requires_grad))
        subject.replaced_logits(context, context.activations.clone().requires_grad_())
        assert needs_grad == [False, False, True]

    @pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
    def test_bfloat16_subject(self, family):
        subject = Subject(tiny_model(family).bfloat16(), LAYER)
        context = subject.context(*ragged_inputs(3))
        assert context.cache is not None
        activations = new_activations(context).float().requires_grad_()
        logits = subject.replaced_logits(context, activations)
        full = subject.replaced_logits_full(context, activations)
        assert (logits - full).float().norm() / full.float().norm() < 0.03
        assert torch.autograd.grad(logits.sum(), activations)[0].dtype == torch.float32

    @pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
    def test_autocast(self, family):
        subject = Subject(tiny_model(family), LAYER)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            context = subject.context(*ragged_inputs(3))
            logits = subject.replaced_logits(context, context.activations)
        assert context.cache is not None
        assert (logits - context.logits).float().norm() / context.logits.float().norm() < 0.03


class TestFallback:
    def test_alibi_falls_back_says_so_once_and_is_still_right(self, caplog):
        model = tiny_model("bloom")
        subject = Subject(model, LAYER)
        with caplog.at_level(logging.WARNING, logger="consistency_lens"):
            context = subject.context(*ragged_inputs(3))
            subject.context(*ragged_inputs(1))
        assert context.cache is None
        assert [record.message.split(":")[0] for record in caplog.records] == ["BloomForCausalLM"]

        activations = new_activations(context)
        row, column = 1, 2
        with subject.stream.replace(LAYER, torch.tensor([[7]]), activations[row, column].view(1, 1, -1)):
            expected = model(input_ids=context.input_ids[row:, :13]).logits[0, 7]
        torch.testing.assert_close(subject.replaced_logits(context, activations)[row, column], expected)

    def test_window_that_only_longer_sequences_leave(self, caplog):
        # Block 1 is the local one, so it has to lie above the layer to matter.
        subject = Subject(tiny_model("gpt_neo", window_size=32), layer=0)
        positions = torch.tensor([[9]])
        assert subject.context(*random_tokens(10), positions).cache is not None
        with caplog.at_level(logging.WARNING, logger="consistency_lens"):
            context = subject.context(*random_tokens(40), positions)
        assert context.cache is None
        assert "logits differ" in caplog.text
        assert_equals_full_pass(subject, context)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("wrong", ["positions", "mask"])
    def test_check_catches_silent_errors(self, dtype, wrong, monkeypatch):
        subject = Subject(tiny_model("llama").to(dtype), LAYER)
        right_mask = subject._attention_mask
        if wrong == "mask":
            monkeypatch.setattr(
                subject, "_attention_mask", lambda *args, **kwargs: torch.zeros_like(right_mask(*args, **kwargs))
            )
        else:
            forward = subject.model.forward
            monkeypatch.setattr(
                subject.model, "forward", lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
            )
        assert not subject.check_one_token(20)

    def test_asked_for(self, caplog):
        subject = Subject(tiny_model("llama"), LAYER, one_token=False)
        assert subject.context(*ragged_inputs(1)).cache is None
        assert not caplog.records

    def test_sequence_of_all_positions(self):
        subject = Subject(tiny_model("gpt2", max_position_embeddings=24), LAYER)
        context = subject.context(*random_tokens(24, 20), torch.tensor([[23, 4], [19, 4]]))
        assert context.cache is not None
        assert_equals_full_pass(subject, context)

    def test_check_leaves_the_random_state_alone(self):
        subject = Subject(tiny_model("llama"), LAYER)
        before = torch.get_rng_state()
        subject.check_one_token(20)
        assert torch.equal(torch.get_rng_state(), before)


class TestThreads:
    @pytest.mark.parametrize("context_attention", [True, False])
    def test_several_get_what_one_gets(self, context_attention):
        def works(model):
            """What reads the model at one layer, and at another, where whole sequences are run."""
            low = Subject(model, LAYER, context_attention=context_attention)
            high = Subject(model, LAYER + 1, one_token=False)

            def read(subject, with_head):
                context = subject.context(*ragged_inputs(3), with_head=with_head)
                replaced = subject.replaced_logits(context, new_activations(context), with_head)
                logits = replaced if with_head else subject.head(replaced.flatten(0, 1))
                return logits, context.activations, subject.activations(*random_tokens(9, 5))

            return [lambda: read(low, True), lambda: read(high, False), lambda: read(low, False)]

        model = tiny_model("llama")
        usual = model.config._attn_implementation
        expected = [work() for work in works(tiny_model("llama"))]
        for found, wanted in zip(at_once(*works(model), times=4), expected, strict=True):
            for tensors in found:
                torch.testing.assert_close(tensors, wanted)
        assert model.config._attn_implementation == usual

    def test_a_backward_pass_may_run_in_another(self):
        """As it does on GPUs, where what was checkpointed then wants the model once more."""
        subject = Subject(tiny_model("llama"), LAYER)
        context = subject.context(*ragged_inputs(3), with_head=False)
        activations = new_activations(context).requires_grad_()
        states = subject.replaced_logits(context, activations, with_head=False)
        logits = TokenLogits.of(states, subject.head, 2).read(lambda logits, _rows: {"logits": logits})["logits"]
        thread = threading.Thread(target=logits.square().sum().backward, daemon=True)
        thread.start()
        thread.join(timeout=60)
        assert activations.grad is not None and activations.grad.abs().min() > 0

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda subject: pickle.loads(pickle.dumps(subject))])
    def test_one_that_was_used_can_be_copied(self, copied):
        subject = Subject(tiny_model("llama"), LAYER)
        expected = subject.activations(*random_tokens(9, 5))
        torch.testing.assert_close(copied(subject).activations(*random_tokens(9, 5)), expected)
