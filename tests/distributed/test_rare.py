"""Tables of rare ids under every plan: counts, frozen rows, clustering, checkpoints."""

import pytest
import torch

from cce_torchrec import CCEEmbeddingBagCollection, ClusteringSchedule
from cce_torchrec.codes.chunk_codes import codes_of
from cce_torchrec.distributed.state_dict import _own_notes
from tests.distributed.test_checkpoint import save_jobs
from tests.support.clustering import told_of
from tests.support.jobs import load_jobs
from tests.support.models import SUM, Model, RareNet, batch, rare_tables, shard
from tests.support.ranks import on_ranks
from tests.support.twins import Pair

KINDS = ["tw", "cw", "rw"]


def made():
    return CCEEmbeddingBagCollection(rare_tables())


@on_ranks(2, 3)
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_is_unsharded(rank, world_size, kind):
    """Outputs, frozen rows and a clustering step with shrinkage."""
    Pair(kind, (), SUM, False, make=made).check(batch)


@on_ranks(2, 3)
@pytest.mark.parametrize("kind", KINDS)
def test_each_recipe_in_its_time_is_as_unsharded(rank, world_size, kind):
    """By a schedule that clusters tables of rare ids after steps of their own."""
    schedule = ClusteringSchedule(frozenset({1, 3}), rare=frozenset({2, 3}))
    pair = Pair(kind, (), SUM, False, make=made)
    for step, expected in ((1, {"v"}), (2, {"t", "u"}), (3, {"t", "u", "v"})):
        pair.copy()
        pair.train(batch, (step,))
        pair.copy()
        reports = [schedule.cluster_if_due(one, step) for one in (pair.model, pair.plain)]
        told = [[told_of(chunk) for chunk in report.chunks] for report in reports]
        assert told[0] == told[1]
        found = {chunk.table.rpartition(".")[2] for chunk in reports[0].chunks}
        assert found == expected
        pair.compare(exact=True)
    pair.train(batch, (4,))
    pair.compare(exact=False)


@on_ranks(2)
def test_data_parallel_is_unsharded(rank, world_size):
    pair = Pair("tw", ("t",), SUM, False, make=made)
    pair.copy()
    pair.train(batch, (0, 1))
    pair.compare(exact=False)


@on_ranks(2)
@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_one_process(rank, world_size, kind):
    """Of batches that the twin has whole."""
    configs, plain = rare_tables(), made()
    model = shard(Model(made()), configs, kind)
    for step in range(12):
        batches = [batch(10 * step + r, False) for r in range(world_size)]
        model(batches[rank]).wait()
        values = {k: torch.cat([b[k].values() for b in batches]) for k in list(batches[0].keys())}
        lengths = torch.cat([torch.tensor([len(v)]) for v in values.values()])
        plain(type(batches[0])(list(values), torch.cat(list(values.values())), lengths=lengths))
    for name in ("t", "u", "v"):
        part, whole = codes_of(model.module.collection.codes, name), plain.codes[name]
        assert int(part.batches) == int(whole.batches) == 12
        if not part.chunks:
            continue
        expected = _own_notes(whole.counts, part.counts, part.ids.start // 2)
        used = -(-len(part.ids) // 2)
        assert torch.equal(part.counts[:used], expected[:used]) and (rank or expected.any())


@pytest.fixture(scope="module")
def saved(rank_pool, tmp_path_factory):
    """Jobs of several plans, whose counts decide how they go on."""
    found, folder = {}, str(tmp_path_factory.mktemp("rare"))
    for world_size, kind in ((1, "unsharded"), (2, "cw"), (3, "rw")):
        found |= rank_pool.run(world_size, save_jobs, folder, [kind], "rowwise", RareNet)[0]
    return found


@pytest.mark.parametrize(
    ("world_size", "kind"), [(1, "unsharded"), (2, "tw"), (2, "rw"), (2, "dp")]
)
def test_any_plan_to_any_other(rank_pool, world_size, kind, saved):
    rank_pool.run(world_size, load_jobs, kind, saved, RareNet)
