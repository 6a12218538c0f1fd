import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from flop_count import flops
from operations import Gradients
from tiny_lenses import INJECTED, PROMPTS, activations, disturb, tiny_lens
from tiny_models import VOCAB_SIZE, WIDTH
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from consistency_lens import summed_gradient
from consistency_lens.straight_through import row_keys, straight_through_embedding
from consistency_lens.summed_gradient import SummedGradient, can_be_summed

ROWS, STEPS, TAU = 3, 4, 0.7


def steps_of(layer, table, inputs, summed):
    """A chain of steps, each of which reads what the one before has drawn from; `table` may be the layer's weight."""
    total = 0.0
    for step in range(STEPS):
        head, rows = summed
        with head.in_place_of(layer):
            logits = layer(inputs)
        keys = row_keys(0, step, torch.arange(len(inputs)))
        ids = logits.argmax(-1)
        inputs = straight_through_embedding(logits, ids, keys, rows, TAU) + 0.1 * inputs
        total = total + logits.square().mean() + inputs.sin().sum()
    return total + rows.rows(torch.tensor([1, 1, 4])).cos().sum()


def plain_steps_of(layer, table, inputs):
    total = 0.0
    for step in range(STEPS):
        logits = layer(inputs)
        keys = row_keys(0, step, torch.arange(len(inputs)))
        inputs = straight_through_embedding(logits, logits.argmax(-1), keys, table, TAU) + 0.1 * inputs
        total = total + logits.square().mean() + inputs.sin().sum()
    return total + F.embedding(torch.tensor([1, 1, 4]), table).cos().sum()


@pytest.mark.parametrize("rows_at_once", [0, 2 * ROWS, 10_000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_many_uses_have_the_gradients_of_autograd(monkeypatch, tied, bias, rows_at_once):
    monkeypatch.setattr(summed_gradient, "ROWS_AT_ONCE_ON_CPU", rows_at_once)
    torch.manual_seed(0)
    layer = nn.Linear(6, 11, bias=bias)
    table = layer.weight if tied else nn.Parameter(torch.randn(11, 6))
    inputs = torch.randn(ROWS, 6, requires_grad=True)
    wanted = list({id(p): p for p in (*layer.parameters(), table, inputs)}.values())
    expected_value = plain_steps_of(layer, table, inputs)
    expected = torch.autograd.grad(expected_value, wanted)

    head = SummedGradient(layer.weight)
    value = steps_of(layer, table, inputs, (head, head if tied else SummedGradient(table)))
    torch.testing.assert_close(value, expected_value)
    # a second backward pass of the same graph begins anew
    for keep in (True, False):
        for gradient, other in zip(torch.autograd.grad(value, wanted, retain_graph=keep), expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(layer)


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, grad):
        if Broken.fails:
            raise FloatingPointError("broken")
        return grad


@pytest.mark.parametrize("how", ["of the inputs alone", "broken off"])
def test_a_backward_pass_that_gives_the_weight_nothing_leaves_nothing_for_the_next(how):
    torch.manual_seed(0)
    layer, table = nn.Linear(6, 11), nn.Parameter(torch.randn(11, 6))
    inputs = torch.randn(ROWS, 6, requires_grad=True)
    wanted = [layer.weight, table]
    expected = torch.autograd.grad(plain_steps_of(layer, table, inputs), wanted)
    value = steps_of(layer, table, Broken.apply(inputs), (SummedGradient(layer.weight), SummedGradient(table)))
    Broken.fails = how == "broken off"
    if Broken.fails:
        with pytest.raises(FloatingPointError):
            torch.autograd.grad(value, inputs, retain_graph=True)
    else:
        torch.autograd.grad(value, inputs, retain_graph=True)
    for gradient, other in zip(torch.autograd.grad(value, wanted), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)


class Products(TorchDispatchMode):
    """Notes the shapes of the gradients (V, d) that products make or add to, and of how many rows each is."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket.__name__ in ("mm", "addmm"):
            left, right = args[-2:]
            if (left.shape[0], right.shape[1]) == (11, 6):
                self.rows.append(left.shape[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows_at_once", "expected"), [(0, [3, 3, 3, 3]), (6, [6, 6]), (7, [9, 3]), (99, [12])])
def test_uses_wait_until_there_are_rows_enough_for_a_product(monkeypatch, rows_at_once, expected):
    monkeypatch.setattr(summed_gradient, "ROWS_AT_ONCE_ON_CPU", rows_at_once)
    summed = SummedGradient(nn.Parameter(torch.zeros(11, 6)))
    total = sum(summed.linear(torch.ones(ROWS, 6)).sum() for _ in range(STEPS))
    with Products() as products:
        total.backward()
    assert products.rows == expected


@pytest.mark.parametrize("half", [False, True])
def test_its_products_are_counted(half):
    layer, inputs = nn.Linear(32, 64, bias=False), torch.randn(16, 32, requires_grad=True)

    def work(product):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = product(inputs)
        outputs.float().sum().backward()

    assert flops(lambda: work(SummedGradient(layer.weight).linear)) == flops(lambda: work(layer)) > 0


def test_the_casts_of_a_step_go_with_it():
    layer = nn.Linear(32, 64, bias=False)
    summed = SummedGradient(layer.weight)
    gc.disable()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = summed.linear(torch.randn(16, 32))
        outputs.float().sum().backward()
        cast = weakref.ref(summed.cast(torch.bfloat16))
        del summed, outputs
        assert cast() is None
    finally:
        gc.enable()


def test_under_autocast_the_products_are_those_of_autocast():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(32, 64, bias=False), torch.randn(16, 32)
    gradients = []
    for summed in (None, SummedGradient(layer.weight)):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = layer(inputs) if summed is None else summed.linear(inputs)
        assert outputs.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(outputs.float().square().sum(), layer.weight)[0])
    assert gradients[1].dtype == torch.float32
    torch.testing.assert_close(*gradients)


def test_what_is_no_ordinary_weight_with_a_gradient_is_not_summed():
    weight = nn.Parameter(torch.zeros(3, 2))
    assert can_be_summed(weight) and not can_be_summed(weight + 0)
    assert not can_be_summed(weight.requires_grad_(False))


LENSES = {
    "llama": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, PROMPTS),
    "scaled table, soft-cap": ("gemma2", {}, INJECTED),
    "bias": ("phi", {}, {"trainable_prompt": False}),
    "gpt2": ("gpt2", {}, {**PROMPTS, "trainable_prompt": False}),
}


def text_gradients(lens, sums, chunk_size=0):
    lens.decoder.sums_gradients = sums
    given = activations(ROWS).requires_grad_()
    keys = row_keys(0, 0, torch.arange(ROWS))
    text = lens.decoder.generate_soft(given, keys, STEPS, tau=TAU, chunk_size=chunk_size, reader=lens.encoder)
    weights = torch.randn(ROWS, STEPS, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    loss = (text.logits.softmax(-1) * weights).sum() + text.embeddings.sin().sum()
    loss = loss + lens.encoder.embed_text(text, keys, TAU).cos().sum()  # autograd's gradient beside the sum
    lens.zero_grad()
    loss.backward()
    return text, {name: p.grad.clone() for name, p in lens.named_parameters() if p.grad is not None} | {
        "activations": given.grad
    }


@pytest.mark.parametrize("name", LENSES)
def test_a_text_has_the_gradients_of_steps_with_their_own(name):
    family, model, arguments = LENSES[name]
    lens = disturb(tiny_lens(family, "full", model, **arguments))
    text, gradients = text_gradients(lens, sums=True)
    plain, expected = text_gradients(lens, sums=False)
    assert torch.equal(text.token_ids, plain.token_ids)
    torch.testing.assert_close(text.logits, plain.logits, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected.keys() and len(gradients) > 10
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("tied", [False, True])
def test_a_longer_text_makes_no_more_gradients_of_the_tables(tied):
    lens = tiny_lens("llama", "full", {"tie_word_embeddings": tied}, trainable_prompt=False)
    counts = {}
    for sums in (True, False):
        lens.decoder.sums_gradients = sums
        for length in (3, 6):
            text = lens.decoder.generate_soft(activations(ROWS), None, length, reader=lens.encoder)
            with Gradients(VOCAB_SIZE, WIDTH) as made:
                (text.logits.square().sum() + text.embeddings.sum()).backward()
            lens.zero_grad()
            counts[sums, length] = made.count
    assert counts[True, 3] == counts[True, 6] == (2 if tied else 3)
    assert counts[False, 6] >= counts[False, 3] + 9
