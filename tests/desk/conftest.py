"""One emulated CUDA device per test. Triton decides when it is imported whether it interprets."""

import os

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETS else ["test_*.py"]

if INTERPRETS:
    import fbgemm_gpu  # noqa: F401
    import torchrec.distributed  # noqa: F401
    import triton.experimental.gluon  # noqa: F401  # the interpreter imports it when it first runs

    import cce_torchrec.distributed.sharders
    import cce_torchrec.fused.triton_kernel
    import cce_torchrec.gpu.probe
    import cce_torchrec.kmeans.triton_kernel  # noqa: F401
    from tests.desk.device import emulated_cuda

    # The kernels are interpreted from here on; the package's CPU paths shall not take them.
    del os.environ["TRITON_INTERPRET"]

    @pytest.fixture(autouse=True)
    def cuda():
        with emulated_cuda():
            yield
