"""A device that there is not: its tensors compute on the CPU, and refuse to meet those of the CPU, as a GPU's do.

In a process that has imported this, and under `PretendDevice`, tensors can be moved to `DEVICE` and back; autocast
casts there what it casts on CUDA. The import changes torch for good, so it belongs into a process of its own. What
torch has for devices made in Python is private, and may change with its version.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
# Operations between devices, and those that take indices from the CPU.
CROSSING, INDEXING = {"copy_", "_to_copy"}, {"index", "index_put_", "index_put", "_index_put_impl_"}
# What autocast computes in its own dtype on CUDA, and what in float32.
LOW = ("linear", "mm", "addmm", "matmul", "bmm", "baddbmm", "mv", "scaled_dot_product_attention")
FULL = (
    "exp", "log", "log1p", "rsqrt", "pow.Tensor_Scalar", "softmax.int", "log_softmax.int", "layer_norm", "sum",
    "sum.dim_IntList", "cumsum", "prod", "mse_loss", "nll_loss", "norm.ScalarOpt_dim", "cosine_similarity",
)  # fmt: skip


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)


class There(Tensor):
    """A tensor of the device; `inside` holds it."""

    inside: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inside: Tensor) -> "There":
        layout = {"strides": inside.stride(), "storage_offset": inside.storage_offset(), "dtype": inside.dtype}
        made = Tensor._make_wrapper_subclass(cls, inside.shape, device=DEVICE, **layout)
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    # Torch makes these in C++, past all dispatch.

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__(moved(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(moved(key), value if isinstance(value, Tensor) else torch.tensor(value, dtype=self.dtype))

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype).to(DEVICE)

    def tolist(self) -> Any:
        return self.inside.tolist()

    def numpy(self) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy")


def moved(key: Any) -> Any:
    """An index that is a list, on the device."""
    return torch.tensor(key).to(DEVICE) if isinstance(key, list) else key


def is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU, whose results are of the device if an argument is, or if it is asked for.

    Raises:
        RuntimeError: if tensors of both meet, but for single numbers and indices.
    """
    name, tensors = func._overloadpacket.__name__, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there, asked = [t for t in tensors if isinstance(t, There)], kwargs.get("device")
    if not there and not is_there(asked):
        return func(*args, **kwargs)
    indices = tensors[1:] if name in INDEXING else []
    strangers = [t for t in tensors if t.dim() > 0 and not any(t is known for known in (*there, *indices))]
    if there and strangers and name not in CROSSING:
        shapes = [(type(t).__name__, tuple(t.shape)) for t in tensors]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, got {shapes}")
    inner_args, inner = tree_map(lambda t: t.inside if isinstance(t, There) else t, (args, kwargs))
    inner |= {} if asked is None else {"device": torch.device("cpu") if is_there(asked) else asked}
    result = func(*inner_args, **inner)
    if name == "copy_":
        return args[0]
    if asked is not None and not is_there(asked):
        return result.clone() if any(result is t.inside for t in there) else result
    out = tree_map(lambda t: There(t) if isinstance(t, Tensor) else t, result)
    return return_and_correct_aliasing(func, args, kwargs, out) if there and name != "_to_copy" else out


class PretendDevice(TorchDispatchMode):
    """Lets the device's tensors be made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


_make, _make_as = torch.tensor, torch.as_tensor


def _tensor(data: Any, *, device: Any = None, **settings: Any) -> Tensor:
    return _make(data, **settings).to(DEVICE) if is_there(device) else _make(data, device=device, **settings)


def _as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    if not isinstance(data, There) and not is_there(device):
        return _make_as(data, dtype=dtype, device=device)
    made = data if isinstance(data, Tensor) else _make_as(data, dtype=dtype)
    return made.to(device=made.device if device is None else device, dtype=dtype or made.dtype)


def _register(name: str, dtype: Callable[[], torch.dtype]) -> None:
    """Has autocast cast the arguments of an operation."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def cast(value: Any) -> Any:
        return (
            value.to(dtype()) if isinstance(value, There) and value.dtype in (torch.float32, torch.bfloat16) else value
        )

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastPrivateUse1)):
            args, kwargs = tree_map(cast, (args, kwargs))
            return operation(*args, **kwargs)

    _aten.impl(name, kernel, "AutocastPrivateUse1")


_others, _aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _name in LOW:
    _register(_name, lambda: torch.get_autocast_dtype(NAME))
for _name in FULL:
    _register(_name, lambda: torch.float32)
torch.tensor, torch.as_tensor = _tensor, _as_tensor
Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign]
# a parameter that moves stays the same object, and tied ones stay tied
torch.__future__.set_swap_module_params_on_conversion(True)
