"""Tables of sharded jobs: plain ones as they are trained, and vectors of compressed ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import cluster, load_checkpoint, save_checkpoint
from cce_torchrec.checkpoint import full_table
from cce_torchrec.inference import inference_collection, vectors_of, write_vectors
from tests.support.jobs import build, step
from tests.support.models import batch, shard
from tests.support.ranks import on_ranks

ROWS, DIM = 103, 16


class Plain(torch.nn.Module):
    def __init__(self, configs):
        super().__init__()
        self.collection = EmbeddingBagCollection(configs)

    def forward(self, features):
        return self.collection(features)


@on_ranks(1, 2)
@pytest.mark.parametrize("kind", ["tw", "rw", "cw", "dp"])
def test_shards_are_put_together(rank, world_size, kind, tmp_path):
    torch.manual_seed(0)
    config = EmbeddingBagConfig(
        name="item", num_embeddings=ROWS, embedding_dim=DIM, feature_names=["f"]
    )
    model = Plain([config])
    if kind != "dp":
        apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    replicated = ["item"] if kind == "dp" else []
    model = shard(model, [config], kind.replace("dp", "tw"), data_parallel=replicated)
    # Each id in a bag of its own; FBGEMM has drawn the weight anew.
    ids = KeyedJaggedTensor(["f"], torch.arange(ROWS), lengths=torch.ones(ROWS).int())
    expected = model(ids).wait()["f"].detach().numpy()
    file = tmp_path / "item.npy"
    found = full_table(model, "item", file=None if kind == "dp" else file)
    assert np.array_equal(np.asarray(found), expected)
    assert kind == "dp" or isinstance(found, np.memmap)
    if kind != "dp":
        with pytest.raises(ValueError, match=r"table 'item' is sharded; give file="):
            full_table(model, "item")
        with pytest.raises(ValueError, match="is there already"):  # on every rank
            full_table(model, "item", file=file)
    assert not [own for own in tmp_path.iterdir() if own.name.startswith(".")]


@on_ranks(2)
@pytest.mark.parametrize("kind", ["tw", "rw"])
def test_vectors_of_a_sharded_model_are_those_of_its_checkpoint(rank, world_size, kind, tmp_path):
    model, dense = build(kind, seed=0)
    step(model, dense, 1)
    cluster(model)
    save_checkpoint(tmp_path / "job", model, step=1, optimizers=[dense])
    alone, _ = build("unsharded", seed=1)
    load_checkpoint(tmp_path / "job", alone)
    served = inference_collection(alone.collection, data_type="fp32", lookup="portable")
    with torch.no_grad():
        trained = model.module.collection(batch(3, False)).wait()
    found = served(batch(3, False))
    for name in found.keys():  # noqa: SIM118  # of a KeyedTensor
        torch.testing.assert_close(found[name], trained[name])
    if rank == 0:
        rows = np.load(write_vectors(served, "f@t", tmp_path / "f.npy"), mmap_mode="r")
        ids = torch.arange(len(rows))
        assert np.array_equal(rows, vectors_of(served, "f@t", ids).numpy())
