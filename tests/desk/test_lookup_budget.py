"""Launches and waits of an expansion: budgets, each with its reason, and what was counted."""

import pytest
import torch

from tests.desk.counts import counting
from tests.desk.emulated import on_cpu
from tests.desk.twins import OPTIONS, batch, joint_tables, mixed_tables, table, twins

LAUNCHES = 8
"""Of an expansion, however many tables. Three are usual, and counts of ids take three more; at 5
microseconds of the host a launch, the twenty that were once allowed are a tenth of a millisecond in
a step of two."""
RANGES = {"none": 17, "hash_ids": 32}
"""Of an expansion whose features have ids of their own in one table, in torch's own operators: 70
to 150 microseconds of the host for all features together."""
WAITS = 0
"""Of an expansion: one would drain the stream in every step."""


def expansion(tables, training, weighted=False):
    """Counts of a second expansion, after the first has compiled and described what it keeps."""
    _, cuda = twins(tables, is_weighted=weighted)
    cuda.train(training)
    for seed in range(2):
        features = batch(len(tables), seed=seed, bad=-1, weighted=weighted).to("cuda")
        with counting() as counts:
            cuda.expansion(features, cuda.bounds_check)
    return counts


def check(counts):
    assert counts.num_launches <= LAUNCHES and counts.num_waits <= WAITS, str(counts)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "serving"])
def test_all_options_together(training, weighted):
    check(expansion(mixed_tables(26), training, weighted))


@pytest.mark.parametrize("training", [True, False], ids=["training", "serving"])
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_alone(option, training):
    check(expansion([table(i, **OPTIONS[option]) for i in range(26)], training))


@pytest.mark.parametrize("option", ["none", "hash_ids", "track_seen"])
def test_launches_do_not_grow_with_tables(option):
    few, many = (
        expansion([table(i, **OPTIONS[option]) for i in range(count)], training=True)
        for count in (2, 26)
    )
    assert few.num_launches == many.num_launches, str(many)


@pytest.mark.parametrize("option", ["none", "hash_ids"])
def test_ids_of_their_own_are_not_waited_for(option):
    counts = expansion(joint_tables(**OPTIONS[option]), training=True)
    assert counts.num_launches <= RANGES[option] and counts.num_waits <= WAITS, str(counts)


def test_buffers_that_were_written_are_read_once():
    """The device is waited for by the lookup after a write, and not by the next one."""
    cpu, cuda = twins(mixed_tables(4))
    features = batch(4, seed=0)
    for rounds in (0, 1, 2):
        for module in (cpu, cuda):
            for codes in module.codes.values():
                codes.clusterings.copy_(torch.full_like(codes.clusterings, rounds))
                if codes.codes is not None:
                    codes.codes.add_(1).remainder_(20)
        rows = cuda.expansion(features.to("cuda"), cuda.bounds_check)
        expected = cpu.expansion(features, cpu.bounds_check)
        assert torch.equal(on_cpu(rows.values()), expected.values())
        with counting() as counts:
            cuda.expansion(features.to("cuda"), cuda.bounds_check)
        copied = counts.num_waits
        with counting() as counts:
            features.to("cuda")
        assert copied == counts.num_waits
