"""finalize() on an unsharded collection, against its definition."""

import copy
import importlib
from dataclasses import asdict

import pytest
import torch
import torchrec
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import cluster, finalize, solver
from cce_torchrec.kmeans import native

N = 3000


def tables(num_rows, num_helper_rows=None):
    return [
        CCEEmbeddingBagConfig(
            name="t", num_embeddings=N, embedding_dim=16, feature_names=["f", "g"],
            num_rows=num_rows, num_helper_rows=num_helper_rows,
        ),
        EmbeddingBagConfig(name="p", num_embeddings=N, embedding_dim=8, feature_names=["f"]),
        CCEEmbeddingBagConfig(
            name="ce", num_embeddings=N, embedding_dim=8, feature_names=["f"], num_chunks=2,
            num_rows=9, num_helper_rows=5, learned_codes=False,
        ),
    ]  # fmt: skip


def module(num_rows, **kwargs):
    torch.manual_seed(0)
    m = CCEEmbeddingBagCollection(tables=tables(num_rows, **kwargs))
    apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, list(m.parameters()), {"lr": 0.1})
    return m


def out(m, bag=1):
    ids, lengths = torch.arange(N), torch.full((2 * N // bag,), bag)
    kjt = KeyedJaggedTensor(["f", "g"], torch.cat([ids, ids.flip(0)]), lengths=lengths)
    return m(kjt).values()


@pytest.mark.parametrize("num_rows", [1, 20, 100])  # codes of 0, 6 and 8 bits get 2, 8 and 10
@pytest.mark.parametrize("compiled", [True, False])
def test_follows_the_definition(monkeypatch, num_rows, compiled):
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    m = module(num_rows)
    out(m).square().sum().backward()
    cluster(m)
    out(m, bag=3).square().sum().backward()
    before = out(m).detach()
    state = {
        name: next(iter(bag.weight._in_backward_optimizers[0].state.values()))["sum"].clone()
        for name, bag in m.embedding_bag_collection.embedding_bags.items()
    }
    old_codes = m.codes["t"].unpacked
    report = finalize(m)
    config, codes = m.embedding_bag_configs()[0], m.codes["t"]
    assert (config.num_rows, config.num_helper_rows) == (4 * num_rows, 0)
    assert codes.packing.bits == {1: 2, 20: 8, 100: 10}[num_rows]
    assert len(report.chunks) == 4
    after = out(m).detach()
    for j, chunk in enumerate(report.chunks):
        bag = m.embedding_bag_collection.embedding_bags[f"t#{j}"]
        old, rows = before[:, 4 * j : 4 * j + 4], codes.unpacked[:, j]
        distances = torch.cdist(old.double(), bag.weight.detach().double()).square()
        best = distances.min(1).values
        torch.testing.assert_close(distances[range(N), rows], best, rtol=1e-4, atol=1e-9)
        assert chunk.objective_after == pytest.approx(float(best.sum()), rel=1e-4)
        # One row per chunk is read, and it is the centroid.
        assert torch.equal(after[:, 4 * j : 4 * j + 4], bag.weight[rows])
        # Its optimizer state is the mean of main's over the ids of the cluster.
        sums = next(iter(bag.weight._in_backward_optimizers[0].state.values()))["sum"].view(-1)
        for row in rows.unique()[:7]:
            mean = state[f"t#{j}"].view(-1)[old_codes[rows == row, j]].mean()
            torch.testing.assert_close(sums[row], mean, rtol=1e-5, atol=1e-7)
    # Feature g is clustered too; one main row and three helper rows give as many vectors.
    assert torch.equal(before[:, 16:24], after[:, 16:24]) == (num_rows == 1)
    assert torch.equal(before[:, 32:], after[:, 32:])  # plain and hashed tables are left alone


def test_training_goes_on_and_checkpoints_load():
    m = module(100)
    out(m).square().sum().backward()
    finalize(m)
    assert finalize(m).chunks == [] and cluster(m).chunks == []
    fresh = module(400, num_helper_rows=0)
    fresh.load_state_dict(m.state_dict())
    assert torch.equal(out(fresh), out(m))
    loss = [float(out(m).square().sum())]
    for _ in range(3):
        out(m).square().sum().backward()
        loss.append(float(out(m).square().sum()))
    assert loss == sorted(loss, reverse=True)


def test_more_rows_lose_less():
    """k + k' clusters represent the ids better than k, which a further clustering would keep."""
    one = module(50)
    other = copy.deepcopy(one)
    clustered = sum(c.objective_after for c in cluster(one).chunks)
    assert sum(c.objective_after for c in finalize(other).chunks) < 0.6 * clustered


def test_a_failure_changes_nothing():
    m = module(20)
    with torch.no_grad():
        m.embedding_bag_collection.embedding_bags["t#3"].weight[0, 0] = torch.nan
    before = {k: v.clone() for k, v in m.state_dict().items()}
    with pytest.raises(ValueError, match="table 't', chunk 3"):
        finalize(m)
    with pytest.raises(ValueError, match="init 'main' has no start"):
        finalize(module(20), init="main")
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num())
               for k, v in m.state_dict().items())  # fmt: skip
    assert m.embedding_bag_configs()[0].num_helper_rows == 60


def test_a_failure_after_codes_were_widened_narrows_them_again(monkeypatch):
    m = module(100)  # 400 rows after finalize: codes of 10 bits
    before = m.codes["t"].codes.clone()

    def fails(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(solver, "find_pairs", fails)
    with pytest.raises(ValueError, match="no memory"):
        finalize(m)
    assert m.codes["t"].packing.bits == 8
    assert torch.equal(m.codes["t"].codes, before)
    assert m.embedding_bag_configs()[0].helper_rows == 300


@pytest.mark.parametrize("call", [cluster, finalize])
def test_every_option_arrives(monkeypatch, call):
    """None of them in another's place: several are numbers, and would pass for each other."""
    given = {
        "iterations": 3,
        "backend": "torch",
        "init": "k-means++",
        "tolerance": 0.5,
        "samples_per_centroid": 7,
        "memory_limit": 11,
        "weights": "seen",
        "metric": {},
        "tables": ["t"],
    }
    seen = []
    monkeypatch.setattr(
        importlib.import_module(call.__module__),
        "run",
        lambda model, options, *_: (seen.append(options), ({}, set()))[1],
    )
    given |= {"recipes": ["rare"]} if call is cluster else {}
    call(torch.nn.Module(), **given)
    options = asdict(seen[0])
    assert options.pop("finalize") == (call is finalize)
    assert options == {"recipes": None} | given  # which finalize has not
