"""Makes `device="cuda"`, `.to("cuda")`, `torch.cuda` and Triton launches work when emulated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch.overrides import TorchFunctionMode
from torchrec.distributed import batched_embedding_kernel
from triton.runtime.interpreter import InterpretedFunction

from cce_torchrec.gpu import usable
from tests.desk import counts
from tests.desk.arguments import mapped, tensors_in
from tests.desk.emulated import CUDA, Emulated, emulated
from tests.desk.kernels import run_interpreted
from tests.desk.stand_ins import lookup, table_slice

TOTAL_BYTES, FREE_BYTES = 80 << 30, 70 << 30
RESERVED_BYTES, ALLOCATED_BYTES = 3 << 30, 1 << 30
CAPABILITY = (9, 0)
NAME = "NVIDIA H100 (emulated)"


@contextlib.contextmanager
def emulated_cuda() -> Iterator[None]:
    """Inside, there is one CUDA device."""
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in _STUBS.items():
            patch.setattr(torch.cuda, name, stub)
        patch.setattr(InterpretedFunction, "run", run_interpreted)
        patch.setattr(batched_embedding_kernel, "TableBatchedEmbeddingSlice", table_slice)
        patch.setattr(SplitTableBatchedEmbeddingBagsCodegen, "forward", _looked_up)
        usable._fault_of.cache_clear()
        # Parameters become new ones in Module.to(): data of a CPU one cannot be set to emulated.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with _Device():
                yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
    usable._fault_of.cache_clear()


_fbgemm_forward = SplitTableBatchedEmbeddingBagsCodegen.forward


def _looked_up(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    emulates = isinstance(module.weights_dev, Emulated)
    return (lookup if emulates else _fbgemm_forward)(module, *args, **kwargs)


class _Device(TorchFunctionMode):
    """Functions that make tensors on a device or move them there, which have no C++ kernel here."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _METHODS and args and isinstance(args[0], torch.Tensor):
            return _METHODS[name](func, *args, **kwargs)
        device = kwargs.get("device")
        if device is None or name == "Generator":
            return func(*args, **kwargs)
        has_own = any(isinstance(tensor, Emulated) for tensor in tensors_in((args, kwargs)))
        kind = torch.device(device).type
        if kind == "cuda":
            return _made(func, name, has_own, args, dict(kwargs))
        if has_own:  # as zeros_like(own, device="cpu"): other devices from here
            args, kwargs = mapped(Emulated, lambda t: t.on_cpu, (args, kwargs))
        return func(*args, **kwargs)


def _made(func: Any, name: str, has_own: bool, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A new tensor on the device."""
    generator = kwargs.get("generator")
    if generator is not None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    del kwargs["device"]
    if name in ("tensor", "as_tensor", "asarray"):
        if isinstance(args[0], Emulated):
            return func(*args, **kwargs)
        counts.waited(f"{name} of host data")
        counts.launched("copy to the device")
        kwargs["device"] = "cpu"
        made = torch.tensor if not isinstance(args[0], torch.Tensor) else torch.asarray
        kwargs |= {"copy": True} if made is torch.asarray else {}
        return _with_grad(made(*args, **kwargs))
    if has_own:
        return func(*args, **kwargs)
    if not name.startswith(("empty", "new_empty")):
        counts.launched(name)
    grad = kwargs.pop("requires_grad", False)
    return emulated(func(*args, **kwargs, device="cpu")).requires_grad_(grad)


def _with_grad(tensor: torch.Tensor) -> Emulated:
    return emulated(tensor.detach()).requires_grad_(tensor.requires_grad)


def _to(func: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to`, which moves where the device is another."""
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], torch.Tensor):
        device, dtype, asynchronous = args[0].device, args[0].dtype, False
    elif "other" in kwargs:
        device, dtype, asynchronous = kwargs["other"].device, kwargs["other"].dtype, False
    else:
        device, dtype, asynchronous, _ = torch._C._nn._parse_to(*args, **kwargs)
    moved = _moved(tensor, device, asynchronous) if device is not None else tensor
    if dtype is not None and dtype != moved.dtype:
        return torch.Tensor.to(moved, dtype)
    return moved.clone() if copy and moved is tensor else moved


def _moved(tensor: torch.Tensor, device: torch.device, asynchronous: bool) -> torch.Tensor:
    if device.type == tensor.device.type:
        return tensor
    if device.type not in ("cuda", "cpu") or tensor.is_meta:
        return torch.Tensor.to(tensor, device)
    to_host = device.type == "cpu"
    counts.launched("copy to the host" if to_host else "copy to the device")
    if not asynchronous:
        counts.waited("copy to the host" if to_host else "copy to the device")
    elif not to_host and not getattr(tensor, "pinned", False):
        counts.waited("copy of memory that is not pinned")
    move = _ToHost if to_host else _ToDevice
    return move.apply(tensor) if tensor.requires_grad else move.forward(None, tensor)


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return emulated(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.on_cpu.clone()


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.on_cpu.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return emulated(grad.clone())


def _pinned(func: Any, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    if isinstance(tensor, Emulated):
        raise RuntimeError("cannot pin 'cuda' memory, only dense CPU tensors can be pinned")
    out = tensor.clone()
    out.pinned = True
    return out


def _new_tensor(func: Any, like: torch.Tensor, data: Any, **kwargs: Any) -> torch.Tensor:
    kwargs.setdefault("dtype", like.dtype)
    kwargs.setdefault("device", like.device)
    return (
        torch.tensor(data, **kwargs)
        if like.device.type == "cpu"
        else _made(torch.tensor, "tensor", False, (data,), kwargs)
    )


_METHODS = {
    "new_tensor": _new_tensor,
    "to": _to,
    "cuda": lambda _, tensor, device=None, non_blocking=False, **__: _moved(
        tensor, CUDA, non_blocking
    ),
    "cpu": lambda _, tensor, **__: _moved(tensor, torch.device("cpu"), False),
    "pin_memory": _pinned,
    "is_pinned": lambda _, tensor, *__: getattr(tensor, "pinned", False),
    "record_stream": lambda *_: None,
}


class _Handle:
    """A stream, an event or a guard of either or of a device: everything runs in order here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = CUDA

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        counts.waited("synchronize")

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Handle()

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


class _Guard(_Handle):
    """`torch.cuda.device_of`, which asks the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        assert tensor.is_cuda, "device_of a CPU tensor: a launch on it means host memory"


def _constant(value: Any) -> Any:
    return lambda *_, **__: value


_STUBS: dict[str, Any] = {
    "is_available": _constant(True),
    "is_initialized": _constant(True),
    "_lazy_init": _constant(None),
    "init": _constant(None),
    "device_count": _constant(1),
    "current_device": _constant(0),
    "set_device": _constant(None),
    "get_device_capability": _constant(CAPABILITY),
    "get_device_name": _constant(NAME),
    "get_device_properties": _constant(
        SimpleNamespace(name=NAME, total_memory=TOTAL_BYTES, major=9, minor=0)
    ),
    "mem_get_info": _constant((FREE_BYTES, TOTAL_BYTES)),
    "memory_reserved": _constant(RESERVED_BYTES),
    "memory_allocated": _constant(ALLOCATED_BYTES),
    "is_current_stream_capturing": _constant(False),
    "synchronize": lambda *_: counts.waited("torch.cuda.synchronize"),
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": _constant(None),
    "empty_cache": _constant(None),
    "current_stream": _Handle,
    "default_stream": _Handle,
    "stream": _Handle,
    "Stream": _Handle,
    "Event": _Handle,
    "device": _Handle,
    "device_of": _Guard,
}
