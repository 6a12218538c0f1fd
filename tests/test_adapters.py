"""Adapters: which settings are refused; a layer and its adapter as one node; what autocast gives them."""

import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from operations import Gradients, Operations
from tiny_lenses import activations, disturb, gradients, keys, tiny_lens, trainable
from torch import Tensor

from consistency_lens import ConsistencyLensModel
from consistency_lens.adapters import LayerWithAdapter, adapters_at_once
from consistency_lens.plain_arithmetic import plain_arithmetic

pytest.importorskip("peft")

EVERYWHERE = {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}


class TestLora:
    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"rank": 2}, "lora: PEFT refuses .*rank"),
            ({"r": 2, "target_modules": ["no_such_layer"]}, "lora: PEFT refuses .*no_such_layer"),
            ({"r": 2, "target_modules": ["c_attn"], "bias": "all"}, r"lora: these settings train .*bias"),
            ({"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["ln_1"]}, "lora: these settings train .*ln_1"),
            ({"r": 2, "target_modules": ["c_attn", "wte"]}, "lora: these settings train .*lora_embedding"),
        ],
    )
    def test_settings_that_do_not_fit_are_refused(self, settings, message):
        pytest.importorskip("peft")
        with pytest.raises(ValueError, match=message):
            tiny_lens("gpt2", "lora", lora=settings)

    @pytest.mark.parametrize("family", ["llama4", "gpt2", "opt_350m"])
    def test_adapters_on_all_linear_layers_leave_routers_out_and_do_not_warn(self, family):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lens = tiny_lens(family, "lora", lora=EVERYWHERE)
        assert not any("router" in name for name in trainable(lens))
        output = lens(activations(), noise_keys=keys())
        assert any(gradient is not None for gradient in gradients(output.reconstruction.sum(), lens).values())

    def test_without_peft_the_error_names_the_extra(self, monkeypatch):
        real = importlib.import_module

        def without_peft(name, *arguments):
            if name == "peft":
                raise ModuleNotFoundError("No module named 'peft'")
            return real(name, *arguments)

        monkeypatch.setattr(importlib, "import_module", without_peft)
        with pytest.raises(ValueError, match=r"training='lora' needs the package 'peft'.*consistency-lens\[lora\]"):
            tiny_lens("llama", "lora")


class MarkedParameter(torch.nn.Parameter):
    """A weight of another kind."""


@contextmanager
def both(first: AbstractContextManager, second: AbstractContextManager) -> Iterator[None]:
    with first, second:
        yield


def disturb_calls(lens: ConsistencyLensModel) -> None:
    """Puts a hook that does nothing on each layer with an adapter."""
    for name in adapted(lens):
        lens.get_submodule(name).register_forward_hook(lambda *_: None)


def training_lens(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> ConsistencyLensModel:
    """A lens with adapters that do something, in training; `settings` of LoRA."""
    lens = disturb(tiny_lens(family, "lora", {"dtype": dtype}, lora={**EVERYWHERE, **settings})).train()
    lens.subject.check_one_token(64)
    return lens


def step(lens: ConsistencyLensModel, around: Callable[[], AbstractContextManager]) -> tuple[Tensor, dict[str, Tensor]]:
    """The reconstruction, and the gradients of all that is trained."""
    lens.zero_grad()
    with around():
        reconstruction = lens(activations=activations(3), noise_keys=keys(3), tau=1.0).reconstruction
    reconstruction.square().mean().backward()
    return reconstruction.detach(), {name: p.grad for name, p in lens.named_parameters() if p.grad is not None}


def at_once(lens: ConsistencyLensModel) -> list[str]:
    """Names of the layers that run as one node."""
    with adapters_at_once(lens):
        return [
            name for name, module in lens.named_modules() if isinstance(vars(module).get("forward"), LayerWithAdapter)
        ]


def adapted(lens: ConsistencyLensModel) -> list[str]:
    """Names of the layers that have an adapter."""
    return [name for name, module in lens.named_modules() if hasattr(module, "lora_A")]


class TestAtOnce:
    # without a bias, with one in some layers, in all layers, and in layers that keep their weights transposed
    @pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gpt2"])
    def test_a_layer_and_its_adapter_are_what_they_are_one_by_one(self, family):
        lens = training_lens(family)
        assert at_once(lens) == adapted(lens) != []
        expected, of_expected = step(lens, nullcontext)
        found, of_found = step(lens, lambda: adapters_at_once(lens))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert any(".lora_" in name for name in of_found) and of_found.keys() == of_expected.keys()
        for name, gradient in of_expected.items():
            torch.testing.assert_close(of_found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.norm().item())

    def test_without_gradients_first_they_have_them_afterwards(self):
        lens = training_lens()

        def read_before():
            stack = ExitStack()
            stack.enter_context(adapters_at_once(lens))
            with torch.no_grad():
                lens(activations=activations(3), noise_keys=keys(3), tau=1.0)
            return stack

        _, expected = step(lens, lambda: adapters_at_once(lens))
        _, found = step(lens, read_before)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    def test_they_are_fewer_operations(self):
        lens, counts = training_lens(), list[Counter[str]]()
        for around in (nullcontext, lambda: adapters_at_once(lens)):
            with Operations() as operations:
                step(lens, around)
            counts.append(operations.counts)
        one_by_one, once = counts
        # of a use: a factor and a sum forward; a factor and the sums of three gradients backward
        uses = one_by_one["mm"] - once["mm"]
        assert uses > 100 and one_by_one.total() - once.total() > 3 * uses

    def test_a_longer_text_makes_no_more_gradients_of_an_adapter(self):
        lens, counts = training_lens(), dict[tuple[bool, int], int]()
        trained = lens.decoder.get_submodule(adapted(lens.decoder)[0]).lora_A["lens"].weight
        for once in (True, False):
            for length in (3, 6):
                with plain_arithmetic(plain=not once), adapters_at_once(lens):
                    text = lens.decoder.generate_soft(activations(3), None, length)
                    with Gradients(*trained.shape) as made:
                        text.logits.square().sum().backward()
                counts[once, length] = made.count
        assert counts[True, 3] == counts[True, 6]
        assert counts[False, 6] >= counts[False, 3] + 3 * len(adapted(lens.decoder))

    def test_a_layer_is_as_it_was_afterwards(self):
        lens = training_lens()
        with pytest.raises(RuntimeError), adapters_at_once(lens):
            raise RuntimeError
        assert not any("forward" in vars(module) for module in lens.modules())


class TestUnderAutocast:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_layer_is_no_further_from_exact_than_one_by_one(self, dtype):
        lens = training_lens(dtype=dtype)
        layer = lens.get_submodule(adapted(lens)[0])
        inputs, weights = torch.randn(7, 3, layer.in_features), torch.randn(7, 3, layer.out_features)
        trained = [layer.lora_A["lens"].weight, layer.lora_B["lens"].weight]

        def run(make_context: Callable[[], AbstractContextManager], exact: bool = False) -> list[Tensor]:
            given = inputs.clone().requires_grad_()
            with nullcontext() if exact else torch.autocast("cpu", torch.bfloat16), make_context():
                output = layer(given)
            return [output, *torch.autograd.grad((output.float() * weights).sum(), [given, *trained])]

        one_by_one, once = run(nullcontext), run(lambda: adapters_at_once(lens))
        lens.float()  # the rounded weights, in float32
        exact = run(nullcontext, exact=True)
        for ours, theirs, true in zip(once, one_by_one, exact, strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours - true).norm() < 1.2 * (theirs - true).norm() + 1e-3 * true.norm()

    def test_a_weight_is_rounded_once_a_step_however_many_passes_and_clones_use_it(self):
        lens = training_lens()
        shape = lens.subject.model.model.layers[0].mlp.up_proj.weight.shape
        with Operations() as operations, torch.autocast("cpu", torch.bfloat16), adapters_at_once(lens):
            lens(activations=activations(3), noise_keys=keys(3), tau=1.0)
        # of each block its two matrices of this shape
        assert operations.shapes.count(shape) == 2 * lens.subject.model.config.num_hidden_layers

    def test_others_read_their_inputs_as_they_are(self):
        lens = training_lens(dtype=torch.bfloat16)
        disturb_calls(lens)
        autocast, found, counts = torch.autocast("cpu", torch.bfloat16), [], []
        for around in (nullcontext, plain_arithmetic, lambda: adapters_at_once(lens)):
            with Operations() as operations:
                found.append(step(lens, lambda around=around: both(autocast, around())))
            counts.append(operations.counts["_to_copy"])
        (_, expected), _, (_, gradients) = found
        assert any(".lora_" in name for name in gradients)
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
        # one to the dtype of the adapter, and one back, in either direction, for each token of the decoder at least
        assert counts[2] < counts[0] - 4 * len(adapted(lens))

    def test_where_it_is_off_others_get_inputs_of_their_own_dtype(self):
        lens = training_lens(dtype=torch.bfloat16)
        disturb_calls(lens)
        layers = [lens.get_submodule(name) for name in adapted(lens)]
        with adapters_at_once(lens):
            assert all(layer.cast_input_dtype_enabled for layer in layers)
            lens.decode_ids(activations(2))
        with torch.autocast("cpu", torch.bfloat16):
            with plain_arithmetic(), adapters_at_once(lens):
                assert all(layer.cast_input_dtype_enabled for layer in layers)
            with adapters_at_once(tiny_lens()):  # without adapters
                pass
            with pytest.raises(RuntimeError), adapters_at_once(lens):
                assert not any(layer.cast_input_dtype_enabled for layer in layers)
                raise RuntimeError
        assert all(layer.cast_input_dtype_enabled for layer in layers)


class TestPeftsWay:
    """What keeps a layer, or all of them, from running as one node."""

    @pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
    def test_adapters_that_are_more_than_two_matrices(self, settings):
        if "lora_bias" in settings:
            settings = {**settings, "target_modules": ["dense"]}  # PEFT has it for layers with a bias alone
        lens = training_lens("gpt_neox" if "lora_bias" in settings else "llama", **settings)
        assert adapted(lens) and at_once(lens) == []
        if "lora_dropout" in settings:
            assert at_once(lens.eval()) == adapted(lens)

    def test_layers_that_are_no_linear_ones(self):
        lens = training_lens("falcon")  # whose layers are of a class of their own
        assert adapted(lens) and at_once(lens) == []

    @pytest.mark.parametrize("part", ["", ".base_layer", ".lora_A.lens", ".lora_B.lens"])
    def test_a_layer_whose_calls_somebody_sees(self, part):
        lens = training_lens()
        first, *others = adapted(lens)
        seen = lens.get_submodule(first + part)
        hook = seen.register_forward_pre_hook(lambda *_: None)
        assert at_once(lens) == others
        hook.remove()
        assert at_once(lens) == [first, *others]
        seen.forward = seen.forward
        assert at_once(lens) == others

    def test_a_head_whose_logits_may_be_made_again(self):
        lens = training_lens(target_modules=["lm_head", "q_proj"])
        heads = [name for name in adapted(lens) if name.endswith("lm_head")]
        assert heads and at_once(lens) == [name for name in adapted(lens) if name not in heads]

    def test_blocks_that_run_again(self):
        lens = training_lens()
        lens.gradient_checkpointing_enable()
        assert at_once(lens) == []
        assert at_once(lens.eval()) == adapted(lens)

    def test_compiled_clones(self):
        lens = training_lens()
        lens.encoder.base.compile(backend="eager")
        assert at_once(lens) == []

    def test_adapters_that_are_off_or_merged_or_others(self):
        lens = training_lens()
        first, second, third, *others = adapted(lens)
        lens.get_submodule(first).enable_adapters(False)
        lens.get_submodule(second).merge()
        lens.get_submodule(third).set_adapter([])
        assert at_once(lens) == others

    def test_precisions_that_differ_without_autocast(self):
        lens = training_lens(dtype=torch.bfloat16)
        assert at_once(lens) == []
        with torch.autocast("cpu", torch.bfloat16):
            assert at_once(lens) == adapted(lens)
            assert at_once(lens.double()) == []

    def test_weights_that_are_trained_or_elsewhere(self):
        lens = training_lens()
        names = adapted(lens)
        trained, empty, marked = (lens.get_submodule(name) for name in names[:3])
        trained.base_layer.weight.requires_grad_(True)  # the encoder's too, for they share it
        empty.lora_A["lens"].weight.ds_id = 1  # ZeRO-3's
        marked.lora_B["lens"].weight = MarkedParameter(marked.lora_B["lens"].weight)
        left = {name for name in names if lens.get_submodule(name).base_layer.weight is trained.base_layer.weight}
        assert set(names) - set(at_once(lens)) == left | set(names[:3])

    def test_plain_arithmetic(self):
        lens = training_lens()
        with plain_arithmetic():
            assert at_once(lens) == []
