"""`torchrec.distributed.shard` and `shard_modules`, which compare names before and after."""

import copy

import pytest
import torch
from torchrec.distributed.shard import shard, shard_modules
from torchrec.distributed.sharding_plan import column_wise, data_parallel, table_wise

from cce_torchrec import cluster
from cce_torchrec.distributed.embedding_bag_sharder import CCEEmbeddingBagCollectionSharder
from cce_torchrec.distributed.embedding_collection import CCEEmbeddingCollectionSharder
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan
from tests.support.models import CPU, SGD, Net, SequenceNet, batch, with_optimizer
from tests.support.ranks import on_ranks
from tests.support.twins import copy_state, flat

SHARDERS = {Net: CCEEmbeddingBagCollectionSharder, SequenceNet: CCEEmbeddingCollectionSharder}
PLANS = {
    "tw": lambda: table_wise(rank=1),
    "cw": lambda: {"t": column_wise([1, 0]), "p": table_wise(rank=0), "u": column_wise([0, 1])},
    "dp": data_parallel,
}


@on_ranks(2)
@pytest.mark.parametrize(
    ("net", "kind"), [(Net, "tw"), (Net, "cw"), (Net, "dp"), (SequenceNet, "tw")]
)
def test_a_collection(rank, world_size, net, kind):
    """Parameters, buffers and modules keep their names and order; then codes are learned."""
    unsharded = net(net.configs()).collection
    made = with_optimizer(copy.deepcopy(unsharded), SGD)
    made = shard(made, plan=PLANS[kind](), sharder=SHARDERS[net](), device=CPU)
    kjt = batch(rank, False)
    for _ in range(2):
        copy_state(getattr(made, "bags", made), getattr(unsharded, "bags", unsharded))
        torch.testing.assert_close(flat(made(kjt).wait()).detach(), flat(unsharded(kjt)).detach())
        if kind != "dp":
            cluster(made)


@on_ranks(1, 2)
@pytest.mark.parametrize("net", [Net, SequenceNet])
def test_a_model(rank, world_size, net):
    model = with_optimizer(net(net.configs()), SGD)
    twin, configs = copy.deepcopy(model), net.configs()
    plan = make_plan(model, configs, CPU, "tw")
    shard_modules(model, device=CPU, plan=plan, sharders=get_default_sharders())
    copies = [getattr(one.collection, "bags", one.collection) for one in (model, twin)]
    copy_state(*copies)
    kjt = batch(rank, False)
    torch.testing.assert_close(model(kjt), twin(kjt))
