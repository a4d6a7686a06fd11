"""One NCCL rank for the tests that need a process group."""

import pytest
import torch.distributed as dist

from tests.support.ranks import free_port


@pytest.fixture(scope="module")
def one_rank():
    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()
