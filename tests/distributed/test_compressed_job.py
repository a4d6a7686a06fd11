"""A plain sharded job, compressed from its checkpoint, goes on under another plan of more ranks."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.optim import RowWiseAdagrad

from cce_torchrec import checkpoint_info, load_checkpoint, save_checkpoint
from cce_torchrec.checkpoint import compress_like
from tests.support.command_line import called
from tests.support.models import shard, with_optimizer
from tests.support.ranks import on_ranks

OPTIMIZER = (RowWiseAdagrad, {"lr": 0.1})
IDS = {"u": 500, "v": 500, "s": 20}


class Plain(torch.nn.Module):
    def __init__(self, is_weighted=False):
        super().__init__()
        torch.manual_seed(0)
        self.tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name="user", num_embeddings=500, embedding_dim=16, feature_names=["u", "v"],
                    pooling=PoolingType.MEAN,
                ),
                EmbeddingBagConfig(
                    name="small", num_embeddings=20, embedding_dim=16, feature_names=["s"]
                ),
            ],
            is_weighted=is_weighted,
        )  # fmt: skip
        self.over = torch.nn.Linear(48, 1)

    def forward(self, ids):
        pooled = self.tables(ids)
        # Sharded, by TorchRec too, it comes when it is asked for.
        pooled = pooled.wait() if hasattr(pooled, "wait") else pooled
        return self.over(torch.cat([pooled[name] for name in IDS], dim=1))


def batch():
    random = torch.Generator().manual_seed(1)
    ids = [torch.randint(most, (12,), generator=random) for most in IDS.values()]
    return KeyedJaggedTensor(list(IDS), torch.cat(ids), lengths=torch.full((18,), 2).int())


def configs(model):
    return model.tables.embedding_bag_configs()


def trained(model):
    with_optimizer(model.tables, OPTIMIZER)
    return model


def save_plain(rank, world_size, folder):
    model = trained(Plain())
    sharded = shard(model, configs(model), "tw")
    dcp.save({"model": sharded.state_dict(), "epoch": 3}, checkpoint_id=folder)
    return sharded(batch()).detach()


@pytest.fixture(scope="module")
def job(rank_pool, tmp_path_factory):
    """The folder of a compressed job, and what the plain one gave on a rank."""
    folder = tmp_path_factory.mktemp("jobs")
    outputs = rank_pool.run(2, save_plain, str(folder / "plain"))
    # Of many rows, with which outputs are nearly those of the plain job.
    words = ("--table", "user", "--num-rows", 400, "--num-chunks", 4)
    called("compress", folder / "plain", folder / "compressed", *words)
    return folder / "compressed", outputs[0]


@on_ranks(2, 3)
@pytest.mark.parametrize("kind", ["tw", "cw"])
def test_it_loads_under_any_plan(rank, world_size, kind, job):
    folder, before = job
    model = Plain()
    assert compress_like(model, folder) == ["tables.user"]
    alone = Plain()
    compress_like(alone, folder)
    load_checkpoint(folder, alone)
    sharded = shard(trained(model), configs(model), kind)
    report = load_checkpoint(folder, sharded)
    assert report.tables == ["tables.small", "tables.user"]
    found = sharded(batch())
    torch.testing.assert_close(found, alone(batch()))
    # Rows of noise, which codes of 400 rows for 500 ids keep but for a few: 0.05 is much more.
    assert (found - before).abs().max() < 0.05
    found.square().mean().backward()  # trains on
    assert not torch.equal(sharded(batch()), found)


@on_ranks(2)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_sharded_collections_say_how_they_are_read(rank, world_size, is_weighted, job, tmp_path):
    for number, compressed in enumerate([False, True]):
        model = Plain(is_weighted)
        if compressed:
            compress_like(model, job[0])
        sharded = shard(trained(model), configs(model), "tw")
        save_checkpoint(tmp_path / str(number), sharded, step=1)
        tables = checkpoint_info(tmp_path / str(number)).tables
        reading = tables["tables.user"].reading
        assert (reading.features, reading.pooling) == (["u", "v"], "MEAN")
        assert reading.weighted == is_weighted
        assert tables["tables.user"].kind == ("CCE" if compressed else "plain")
