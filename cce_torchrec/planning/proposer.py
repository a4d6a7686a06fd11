"""Which tables a plan splits into columns: a search whose length does not grow with the tables."""

from __future__ import annotations

import enum
from collections import defaultdict

from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.proposers import (
    GreedyProposer,
    GridSearchProposer,
    UniformProposer,
)
from torchrec.distributed.planner.types import Enumerator, Perf, Proposer, ShardingOption, Storage

_STEPS = 32
"""Proposals from no table split to all of many."""
_PATIENCE = 4
"""Proposals in a row that may be no better than the best before."""
_FEW = 32
"""Tables up to which TorchRec's own search takes no time worth saving."""


class Order(enum.Enum):
    """Which tables are split first."""

    BUSIEST = "busiest"
    """Those that make the busiest ranks so busy."""
    LARGEST = "largest"
    """Those with the most bytes: where memory is scarce they fill ranks, and one of the others has
    all of the small tables."""
    SMALLEST = "smallest"
    """Those with the fewest bytes, which are placed last: their columns fill the gaps."""


def proposers(tables: int) -> list[Proposer]:
    """The searches for a plan of so many tables."""
    ours: list[Proposer] = [UniformProposer(), *map(SplitProposer, Order)]
    if tables > _FEW:
        return ours
    # Every plan of ten tables. By default it is of 13, which takes seconds.
    return [
        GridSearchProposer(max_proposals=2**10),
        GreedyProposer(),
        GreedyProposer(use_depth=False),
        *ours,
    ]


class SplitProposer(Proposer):
    """Begins with every table in its cheapest form and splits tables while that helps.

    TorchRec's GreedyProposer changes one table a proposal, in an order that the plans before have
    no say in, and goes on until every table has had its turn: work that grows with the square of
    the tables. This one has three orders, of which one follows what the last plan was like, and
    stops where a few proposals in a row are no better.

    Args:
        order: of the tables to split, once there is a plan. Until then it is by bytes.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._options: dict[str, list[ShardingOption]] = {}
        self._chosen: dict[str, int] = {}
        self._best, self._no_better = float("inf"), 0

    def load(
        self, search_space: list[ShardingOption], enumerator: Enumerator | None = None
    ) -> None:
        """Starts anew with the forms that each table may have."""
        options = defaultdict(list)
        for option in search_space:
            options[option.fqn].append(option)
        self._options = {
            table: sorted(forms, key=lambda form: form.total_perf)
            for table, forms in options.items()
        }
        self._chosen = dict.fromkeys(self._options, 0)
        self._best, self._no_better = float("inf"), 0

    def propose(self) -> list[ShardingOption] | None:
        """One form of each table, or None at the end."""
        return [self._options[table][form] for table, form in self._chosen.items()] or None

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Takes note of how the last proposal was, and prepares the next."""
        if perf_rating is not None:
            self._no_better = 0 if perf_rating < self._best else self._no_better + 1
            self._best = min(self._best, perf_rating)
        # What does not fit needs room first, whatever its time is.
        order = self._order if partitionable else Order.LARGEST
        movable = [
            table
            for table in _ORDERS[order](plan or [])
            if self._chosen[table] + 1 < len(self._options[table])
        ]
        if not movable or self._no_better == _PATIENCE:
            self._chosen = {}  # then `propose` gives None, by which planners know the end
            return
        for table in movable[: max(1, len(self._chosen) // _STEPS)]:
            self._chosen[table] += 1


def _largest(plan: list[ShardingOption]) -> list[str]:
    """Tables by their largest shard, largest first."""

    def size(option: ShardingOption) -> int:
        stored = [shard.storage or Storage(hbm=0, ddr=0) for shard in option.shards]
        return max(storage.hbm + storage.ddr for storage in stored)

    return [option.fqn for option in sorted(plan, key=size, reverse=True)]


def _busiest(plan: list[ShardingOption]) -> list[str]:
    """The slowest table of the busiest rank, that of the next, and so on; then the second ones."""
    on_rank: dict[int | None, list[tuple[float, str]]] = defaultdict(list)
    for option in plan:
        for shard in option.shards:
            time = (shard.perf or Perf(0, 0, 0, 0)).total
            on_rank[shard.rank].append((time, option.fqn))
    busiest = sorted(on_rank.values(), key=lambda tables: -sum(time for time, _ in tables))
    turns = [
        (turn, rank, table)
        for rank, tables in enumerate(busiest)
        for turn, (_, table) in enumerate(sorted(tables, reverse=True))
    ]
    return list(dict.fromkeys(table for _, _, table in sorted(turns)))


_ORDERS = {
    Order.BUSIEST: _busiest,
    Order.LARGEST: _largest,
    Order.SMALLEST: lambda plan: _largest(plan)[::-1],
}
