"""Checkpoints of models on the device: what is saved loads there, and on the CPU."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cce_torchrec import CCEEmbeddingBagCollection
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering import cluster
from tests.desk.emulated import on_cpu
from tests.desk.twins import assert_same_state, batch, mixed_tables, table, twins
from tests.support.ranks import free_port

TABLES = 9  # one of each option, clustered in a moment


class Model(nn.Module):
    def __init__(self, device, tables):
        super().__init__()
        self.collection = CCEEmbeddingBagCollection(tables, device=device)
        self.over = nn.Linear(16 * len(tables), 1, device=device)

    def forward(self, features):
        return self.over(self.collection(features).values())


def trained(device):
    """A model, its optimizer and a step of both, after a clustering."""
    model = Model(
        device, [table(i, num_embeddings=200, num_rows=5, num_chunks=1) for i in range(2)]
    )
    optimizer = torch.optim.Adam(model.parameters())
    model(batch(2, num_ids=200).to(device)).sum().backward()
    optimizer.step()
    cluster(model, optimizer=optimizer, iterations=1, backend="torch")
    return model, optimizer


@pytest.fixture
def one_rank():
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank", "small_blocks")
@pytest.mark.parametrize("to", ["cpu", "cuda"])
@pytest.mark.parametrize("source", ["cpu", "cuda"])
def test_a_job_is_resumed_on_either(tmp_path, source, to):
    if source == to == "cpu":
        pytest.skip("not the device's")
    model, optimizer = trained(source)
    save_checkpoint(tmp_path, model, step=1, optimizers=[optimizer])
    torch.manual_seed(1)
    other, its_optimizer = trained(to)
    load_checkpoint(tmp_path, other, optimizers=[its_optimizer])
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert two.is_cuda == (to == "cuda") and torch.equal(on_cpu(one), on_cpu(two))
    for one, two in zip(model.buffers(), other.buffers(), strict=True):
        assert two.is_cuda == (to == "cuda") and torch.equal(on_cpu(one), on_cpu(two))
    for one, two in zip(optimizer.state.values(), its_optimizer.state.values(), strict=True):
        assert all(torch.equal(on_cpu(one[key]), on_cpu(two[key])) for key in one)
    features = batch(2, seed=3, num_ids=200)
    expected, got = model(features.to(source)), other(features.to(to))
    torch.testing.assert_close(on_cpu(got), on_cpu(expected))


@pytest.mark.parametrize("to", ["cpu", "cuda"])
def test_state_dicts_cross_devices(tmp_path, to):
    _, cuda = twins(mixed_tables(TABLES))
    cuda(batch(TABLES).to("cuda"))
    for name in cuda.codes:
        cuda.codes[name].set_clusterings(2)
    torch.save(cuda.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    other = CCEEmbeddingBagCollection(mixed_tables(TABLES), device=to)
    other.load_state_dict(state)
    assert all(codes.num_clusterings == 2 for codes in other.codes.values())
    for one, two in zip(cuda.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(on_cpu(one), on_cpu(two))


def test_a_collection_moves():
    cpu, cuda = twins(mixed_tables(TABLES))
    moved = CCEEmbeddingBagCollection(mixed_tables(TABLES))
    moved.load_state_dict(cpu.state_dict())
    moved = moved.to("cuda")
    features = batch(TABLES).to("cuda")
    assert torch.equal(on_cpu(moved(features).values()), on_cpu(cuda(features).values()))
    assert_same_state(cuda, moved)
