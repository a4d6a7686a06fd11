"""When a schedule clusters, and for the last time."""

import pytest

from cce_torchrec import ClusteringSchedule


@pytest.mark.parametrize(
    ("schedule", "last"),
    [
        (ClusteringSchedule.every(30), [90]),
        (ClusteringSchedule.every(50), [100]),
        (ClusteringSchedule.every(101), []),
        (ClusteringSchedule.evenly(100, 4), [90]),
        (ClusteringSchedule.at_epochs([1, 2, 9], 20), [40]),  # the ninth epoch does not come
        (ClusteringSchedule(frozenset({7, 95}), 30), [95]),
        (ClusteringSchedule(frozenset({7, 85}), 30), [90]),
        (ClusteringSchedule.never(), []),
    ],
)
def test_one_step_of_a_run_has_the_last_clustering(schedule, last):
    assert [step for step in range(1, 130) if schedule.is_last(step, 100)] == last
