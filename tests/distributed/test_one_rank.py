"""A rank that is alone in its group sends nothing: what holds on several ranks holds there too."""

from tests.distributed import sequence_checks
from tests.distributed.ranks import run_ranks
from tests.distributed.test_inputs import matrix
from tests.distributed.test_pipeline import both


def alone(rank, world_size):
    matrix(rank, world_size)
    both(rank, world_size)
    sequence_checks.sequences(rank, world_size)
    sequence_checks.bad_ids(rank, world_size)


def test_alone():
    run_ranks(1, alone)
