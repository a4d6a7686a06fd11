"""What ranks decide by the backend of their group: by the device in use, however it was spelled."""

import pytest
import torch
import torch.distributed as dist

from cce_torchrec.collectives import backend_of, check_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "config, on_cpu, on_gpu",
    [
        ("cpu:gloo", "gloo", ""),
        ("cpu:gloo,cuda:nccl", "gloo", "nccl"),
        ("cpu:gloo,cuda:gloo,xpu:gloo", "gloo", "gloo"),
        ("cuda:nccl", "", "nccl"),
        ("cpu:mpi,cuda:nccl", "mpi", "nccl"),
    ],
)
def test_backend_of_a_device(config, on_cpu, on_gpu, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    assert (backend_of(CPU, None), backend_of(GPU, None)) == (on_cpu, on_gpu)
    for device, backend in ((CPU, on_cpu), (GPU, on_gpu)):
        if backend:
            check_backend(device, "group")
            continue
        with pytest.raises(ValueError, match=f"tables are on {device.type} .* {config!r} only; "):
            check_backend(device, "group")


def test_a_job_of_one_process_has_no_backend():
    assert backend_of(CPU, None) == ""
    check_backend(CPU, None)
