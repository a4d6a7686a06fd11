"""One emulated CUDA device per test. Triton decides when it is imported whether it interprets."""

import os

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETS else ["test_*.py"]

if INTERPRETS:
    import fbgemm_gpu  # noqa: F401
    import torch
    import torchrec.distributed  # noqa: F401
    import triton.experimental.gluon  # noqa: F401  # the interpreter imports it when it first runs

    import cce_torchrec.distributed.sharders
    import cce_torchrec.fused.triton_kernel
    import cce_torchrec.gpu.probe
    import cce_torchrec.kmeans.triton_kernel  # noqa: F401
    from cce_torchrec.clustering import budget, ids, pairs, row_wise, solve
    from cce_torchrec.kmeans import backends, points, share
    from tests.desk.device import emulated_cuda

    # The kernels are interpreted from here on; the package's CPU paths shall not take them.
    del os.environ["TRITON_INTERPRET"]

    @pytest.fixture(autouse=True)
    def cuda():
        torch.manual_seed(0)
        with emulated_cuda():
            yield

    @pytest.fixture
    def small_blocks(monkeypatch):
        """Blocks of fixed size are small, so that few points and ids are several of them."""
        for module in (ids, budget, pairs, solve, row_wise, backends, points, share):
            for name, size in (("ID_BLOCK", 1 << 13), ("ASSIGN_BLOCK", 1 << 14), ("BLOCK", 256)):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, size)
