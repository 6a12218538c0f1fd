"""The gradient of a large weight that many steps use, summed up in one place.

A text of T tokens uses the unembedding T times and the embedding tables as often, each time for the rows of a batch
alone. Autograd makes a gradient of the size of the whole weight for every use, and adds it to the others: with a
vocabulary of 32,000 that takes longer than the products themselves. Here the uses leave what their gradients are made
of, and the weight receives the sum once, when all of them have had their turn.
Shapes: n rows of one use, V vocabulary, d width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .table_product import table_product

# A CPU multiplies so many rows at once: a product of fewer takes as long to read and write the sum as to multiply.
# Elsewhere each use is multiplied at once, for what waits takes memory.
ROWS_AT_ONCE_ON_CPU = 384


class SummedGradient:
    """What many uses of one weight add to its gradient.

    Args:
        weight: (V, d), whole on this device.
        rows_at_once: rows that wait for each other before they are multiplied; None: as many as suit its device.
    """

    def __init__(self, weight: Tensor, rows_at_once: int | None = None) -> None:
        self.weight = weight.detach()
        suited = ROWS_AT_ONCE_ON_CPU if weight.device.type == "cpu" else 0
        self._total = ProductSum(self.weight, suited if rows_at_once is None else rows_at_once)
        self._casts: dict[torch.dtype, Tensor] = {}
        # Every use hangs on it, so autograd comes to it after all of them: there the weight gets its gradient. It
        # knows the sum alone: if it knew this object, the casts would stay until Python looks for cycles.
        self.anchor: Tensor = _Anchor.apply(weight, self._total)

    def linear(self, inputs: Tensor) -> Tensor:
        """`inputs @ weight.T` for inputs (..., d): (..., V), under autocast in its dtype."""
        return _Linear.apply(inputs, self.anchor, self)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows (n, d) of the given indices (n,)."""
        return _Rows.apply(ids, self.anchor, self)

    def add_product(self, grad: Tensor, inputs: Tensor) -> None:
        """Adds `grad.T @ inputs`, of rows (n, V) and (n, d)."""
        self._total.add_product(grad, inputs)

    def add_rows(self, ids: Tensor, grad: Tensor) -> None:
        """Adds rows (n, d) to those of the given indices (n,)."""
        self._total.add_rows(ids, grad)

    def cast(self, dtype: torch.dtype) -> Tensor:
        """The weight in another dtype; the copy is made once."""
        if dtype not in self._casts:
            self._casts[dtype] = self.weight.to(dtype)
        return self._casts[dtype]

    @contextmanager
    def in_place_of(self, layer: nn.Linear) -> Iterator[None]:
        """Has a layer that holds the weight, with or without a bias, add to the sum."""

        def forward(inputs: Tensor) -> Tensor:
            outputs = self.linear(inputs)
            return outputs if layer.bias is None else outputs + layer.bias.to(outputs.dtype)

        changed: Any = layer
        changed.forward = forward
        try:
            yield
        finally:
            del changed.forward


def can_be_summed(weight: Tensor) -> bool:
    """Whether a weight is an ordinary one with a gradient."""
    return type(weight) is nn.Parameter and weight.requires_grad


class BackwardSum:
    """What the uses of a tensor have added to its gradient in the running backward pass.

    A pass that broke off, or that did not ask for the gradient, leaves a sum that nobody takes.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._pass = -1
        self._sum: Tensor | None = None

    def buffer(self) -> Tensor:
        """The sum, to be added to; a backward pass begins with zeros."""
        running = torch._C._current_graph_task_id()
        if self._sum is None or running != self._pass:
            self._sum, self._pass = torch.zeros_like(self.tensor), running
        return self._sum

    def take(self) -> Tensor | None:
        """The sum of all uses."""
        total, self._sum = self._sum, None
        return total


class ProductSum:
    """The same of a weight (V, d), to which products and rows are added; they wait until there are enough of them."""

    def __init__(self, weight: Tensor, rows_at_once: int) -> None:
        self.weight, self.rows_at_once = weight, rows_at_once
        self._pass = -1
        self._forget()

    def _forget(self) -> None:
        self._sum: Tensor | None = None
        self._products: list[tuple[Tensor, Tensor]] = []
        self._rows: list[tuple[Tensor, Tensor]] = []

    def _begin(self) -> None:
        running = torch._C._current_graph_task_id()
        if running != self._pass:
            self._forget()
            self._pass = running

    def add_product(self, grad: Tensor, inputs: Tensor) -> None:
        """Adds `grad.T @ inputs`, of rows (n, V) and (n, d)."""
        self._begin()
        self._products.append((grad, inputs))
        if sum(len(inputs) for _, inputs in self._products) >= self.rows_at_once:
            self._multiply()

    def add_rows(self, ids: Tensor, grad: Tensor) -> None:
        """Adds rows (n, d) to those of the given indices (n,)."""
        self._begin()
        self._rows.append((ids, grad))

    def take(self) -> Tensor | None:
        """The sum of all uses."""
        if self._products:
            self._multiply()
        if self._rows:
            ids, grad = _joined(self._rows)
            total = torch.zeros_like(self.weight) if self._sum is None else self._sum
            self._sum = total.index_add_(0, ids, grad.to(total.dtype))
        result = self._sum
        self._forget()
        return result

    def _multiply(self) -> None:
        grad, inputs = _joined(self._products)
        self._products = []
        if self._sum is None:
            self._sum = (grad.T @ inputs).to(self.weight.dtype)
        elif grad.dtype == self._sum.dtype:
            torch.addmm(self._sum, grad.T, inputs, out=self._sum)  # torch's counts of FLOPs leave out `addmm_`
        else:
            self._sum.add_(grad.T @ inputs)


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    first, second = zip(*pairs, strict=True)
    return torch.cat(first), torch.cat(second)


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, total: ProductSum) -> Tensor:
        ctx.total = total
        ctx.set_materialize_grads(False)  # the uses have given the sum their gradients, and autograd none
        return weight.new_empty(())  # nobody reads it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _grad: None) -> tuple[Tensor | None, None]:
        return ctx.total.take(), None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, _anchor: Tensor, summed: SummedGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.summed = summed
        return summed.weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.summed.add_rows(*ctx.saved_tensors, grad)
        return None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, _anchor: Tensor, summed: SummedGradient) -> Tensor:
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        ctx.input_dtype, ctx.summed = inputs.dtype, summed
        inputs = inputs.to(dtype)
        ctx.save_for_backward(inputs)
        with torch.autocast(device, enabled=False):
            return table_product(inputs.flatten(0, -2), summed.cast(dtype)).unflatten(0, inputs.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (inputs,) = ctx.saved_tensors
        grad_inputs = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                ctx.summed.add_product(grad.flatten(0, -2), inputs.flatten(0, -2))
            if ctx.needs_input_grad[0]:
                grad_inputs = (grad @ ctx.summed.cast(grad.dtype)).to(ctx.input_dtype)
        return grad_inputs, None, None
