"""Products in IEEE float32, whatever a job has set for its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from cce_torchrec.torchrec_internals import fp32_precision, set_fp32_precision

_Setting = tuple[str, str]
"""What a precision is set for, as torch names it: a backend and an operation."""
_EVERYTHING: _Setting = ("generic", "all")
_BACKENDS = ("cuda", "mkldnn")
"""GPUs and CPUs: a job's "medium" is bfloat16 on a CPU that has it."""


@contextlib.contextmanager
def ieee_float32(device: torch.device) -> Iterator[None]:
    """Within it products of float32 are IEEE float32; afterwards all is as the job had set it.

    A job sets TF32 or bfloat16 by `fp32_precision` (of products, of a backend or of everything),
    by the older `allow_tf32` or `set_float32_matmul_precision`, or by autocast. Settings are the
    process's: products of its other threads are IEEE meanwhile too.
    """
    own = {(backend, "matmul"): _own_precision(backend) for backend in _BACKENDS}
    for setting in own:
        _set(setting, "ieee")
    # torch refuses to read the older setting where it disagrees with the newer ones; as these say
    # IEEE now, it does not. It must say so too, or reading `allow_tf32` within would fail.
    older = torch.get_float32_matmul_precision()
    try:
        if older != "highest":
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if older != "highest":
            torch.set_float32_matmul_precision(older)  # and the newer ones, which follow
        for setting, precision in own.items():
            _set(setting, precision)


def _own_precision(backend: str) -> str:
    """What is set for products of `backend` itself; "none" if they follow the backend's setting.

    torch tells what holds in the end. Written back as it is, it would be pinned, and a job's later
    change of what stands above it would have no effect.
    """
    of_backend, of_products = (backend, "all"), (backend, "matmul")
    above = _under(_EVERYTHING, _get(_EVERYTHING), of_backend)
    return _under(of_backend, above, of_products)


def _under(parent: _Setting, parents: str, setting: _Setting) -> str:
    """What `setting` has of its own: "none" if it follows `parent`, which has `parents`."""
    seen = []
    try:
        for precision in ("ieee", "tf32"):
            _set(parent, precision)
            seen.append(_get(setting))
    finally:
        _set(parent, parents)
    return seen[0] if seen[0] == seen[1] else "none"


def _get(setting: _Setting) -> str:
    return fp32_precision(*setting)


def _set(setting: _Setting, precision: str) -> None:
    set_fp32_precision(*setting, precision)
