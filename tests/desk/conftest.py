"""One emulated CUDA device per test. Triton decides when it is imported whether it interprets."""

import importlib
import os
import pkgutil

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETS else ["test_*.py"]

if INTERPRETS:
    import fbgemm_gpu  # noqa: F401
    import torch
    import torchrec.distributed  # noqa: F401
    import triton.experimental.gluon  # noqa: F401  # the interpreter imports it when it first runs

    import cce_torchrec.distributed.sharders
    from cce_torchrec.clustering import budget, id_passes, pair_batch, pairs, solver
    from cce_torchrec.kmeans import backends, points, scan
    from tests.desk.device import emulated_cuda

    for module in pkgutil.walk_packages(cce_torchrec.__path__, "cce_torchrec."):
        if "triton" in module.name or module.name == "cce_torchrec.gpu.probe":
            importlib.import_module(module.name)
    # Kernels are interpreted from here on, and the package's CPU paths shall not take them.
    del os.environ["TRITON_INTERPRET"]

    @pytest.fixture(autouse=True)
    def cuda():
        torch.manual_seed(0)
        with emulated_cuda():
            yield

    @pytest.fixture
    def small_blocks(monkeypatch):
        """Blocks of fixed size are small, so that few points and ids are several of them."""
        sizes = {"ID_BLOCK": 128, "GPU_ID_BLOCK": 256, "ASSIGN_BLOCK": 256, "BLOCK": 256}
        for module in (id_passes, budget, pairs, pair_batch, solver, backends, points, scan):
            for name, size in sizes.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, size)
