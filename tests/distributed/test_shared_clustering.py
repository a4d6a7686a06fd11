"""A clustering step gives the same bytes on 1, 2 and 3 ranks, however its work is shared out."""

from __future__ import annotations

from unittest import mock

import pytest

from cce_torchrec.clustering import plan
from cce_torchrec.kmeans import scan
from tests.support.clustering import WAYS, build, digests, metric, small_blocks
from tests.support.ranks import on_ranks

USUAL = plan.SHARE_FROM
CASES = [("pairs", "tw", USUAL, True)]
"""Way, plan, scores from which ranks share a chunk (0: all), whether new codes are kept."""
for _way in ("pairs", "list", "sample"):
    CASES += [(_way, "tw", 0, True), (_way, "cw", 0, False)]
CASES += [("torch", "cw", 0, True)]


def digests_of(rank, world_size, case):
    """`digests` of a case, and the most points that this rank scored in one pass."""
    way, plan_kind, share_from, keep_codes = case
    scored, first = [0], scan.Share.__init__

    def noted(self, points, k, group):
        first(self, points, k, group)
        if group is not None:
            scored.append(self.end - self.start)

    model, sharded = build(plan_kind)
    chosen = {**WAYS[way], "metric": metric() if way == "sample" else None}
    with (
        mock.patch.object(scan.Share, "__init__", noted),
        small_blocks(share_from=share_from, keep_codes=keep_codes),
    ):
        return digests(model, sharded, **chosen), max(scored)


@pytest.fixture(scope="module")
def one_rank(rank_pool):
    """Digests of each case on one rank."""
    return {case: rank_pool.run(1, digests_of, case)[0][0] for case in CASES}


@pytest.mark.parametrize("way", ["pairs", "list", "sample"])
def test_codes_that_wait_and_codes_found_again_agree(way, one_rank):
    assert one_rank[way, "tw", 0, True] == one_rank[way, "cw", 0, False]


def test_every_way_finds_pairs_of_its_own(one_rank):
    assert len(one_rank[CASES[0]]) == 4 + 2 + 1 + 4 + 2 + 1
    assert one_rank["pairs", "tw", 0, True] == one_rank["list", "tw", 0, True]
    assert one_rank["pairs", "tw", 0, True] != one_rank["sample", "tw", 0, True]


@on_ranks(2, 3)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_same_bytes_for_every_number_of_ranks_and_plan(rank, world_size, case, one_rank):
    found, scored = digests_of(rank, world_size, case)
    assert found == one_rank[case]
    # Whoever owns a chunk, every rank scores some of it.
    assert (scored > 0) == (case[2] == 0)
