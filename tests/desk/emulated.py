"""A tensor that says it is on `cuda:0` and computes on the CPU.

`Emulated` wraps a CPU tensor. Python code (the package's, TorchRec's, FBGEMM's) reads its device
as cuda:0; in C++ it is a CPU tensor, since autograd refuses devices that the build lacks.
Operations arrive below autograd in `__torch_dispatch__`, where mixing is refused, costs are noted
and the CPU's kernel runs. `data_ptr()` is that of the CPU memory, so that addresses stored in
descriptor tensors are good for interpreted Triton kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from tests.desk import counts
from tests.desk.arguments import mapped, tensors_in
from tests.desk.stand_ins import STAND_INS

CUDA = torch.device("cuda", 0)
_BETWEEN_DEVICES = {"copy_", "_to_copy", "lift_fresh"}
_TO_HOST = {"_local_scalar_dense", "equal", "is_nonzero"}


class Emulated(torch.Tensor):
    """See the module; `on_cpu` is the tensor behind it, in the same memory."""

    on_cpu: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor) -> Emulated:
        assert type(on_cpu) is torch.Tensor, type(on_cpu)
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            layout=on_cpu.layout,
            device=on_cpu.device,
            requires_grad=False,
        )
        out.on_cpu = on_cpu.detach()
        return out

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return CUDA.index

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        pass

    def tolist(self) -> Any:
        counts.waited("tolist")
        return self.on_cpu.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    __array__ = __dlpack__ = numpy

    def __repr__(self, **_: Any) -> str:
        return f"Emulated({self.on_cpu!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        out = Emulated(self.on_cpu.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            out = torch.nn.Parameter(out, self.requires_grad)
        memo[id(self)] = out
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Emulated, (self.on_cpu.clone(),)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        check_devices(func, args, kwargs)
        counts.note_operation(func, args, kwargs)
        own, own_kwargs = mapped(Emulated, lambda t: t.on_cpu, (args, kwargs))
        found = STAND_INS.get(func._schema.name, func)(*own, **own_kwargs)
        if func._schema.name.split("::")[-1] in _TO_HOST:
            return found
        if args and found is args[0]:  # copy_ to the host
            return found
        out = mapped(torch.Tensor, emulated, found)
        return return_and_correct_aliasing(func, args, kwargs, out) if _is_aten(func) else out


def emulated(tensor: torch.Tensor) -> Emulated:
    """`tensor` as one on the device, in the same memory."""
    return tensor if isinstance(tensor, Emulated) else Emulated(tensor)


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of `tensor`, for comparison; unlike `cpu()` it is not counted, nor copied."""
    return tensor.on_cpu if isinstance(tensor, Emulated) else tensor.detach()


def check_devices(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises what CUDA raises if CPU tensors take part in an operation on device tensors.

    As there, numbers (0-dimensional CPU tensors) may in pointwise operations, and CPU tensors
    may index.
    """
    name = func._schema.name.split("::")[-1]
    if name in _BETWEEN_DEVICES:
        return
    indexes = name in counts.INDEXING and isinstance(args[0], Emulated)
    looked_at = (args[0], args[2:], kwargs) if indexes else (args, kwargs)
    strangers = [tensor for tensor in tensors_in(looked_at) if not _is_own(tensor)]
    numbers = torch.Tag.pointwise in func.tags or indexes or name in ("fill_", "masked_fill_")
    if numbers:
        strangers = [t for t in strangers if t.dim() > 0]
    if strangers:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({func}, tensors of shapes {[tuple(t.shape) for t in strangers]})"
        )


def _is_own(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, Emulated) or tensor.is_meta


def _is_aten(func: Any) -> bool:
    return func.namespace == "aten"
