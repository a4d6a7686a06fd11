"""When a schedule clusters, and for the last time."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagConfig

from cce_torchrec import CCEEmbeddingBagConfig, ClusteringSchedule
from cce_torchrec.clustering import schedule as module


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


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (ClusteringSchedule.evenly(100, 3, finalize=True), [30, 60, 90]),
        (ClusteringSchedule.every(30, final=70), [30, 60, 70]),
        (ClusteringSchedule.every(30, final=60), [30, 60]),
        (ClusteringSchedule.at_epochs([1, 3], 25, finalize=True), [25, 75]),
        (ClusteringSchedule(frozenset({7, 95}), 30, 80), [7, 30, 60, 80]),
        (ClusteringSchedule(final=12), [12]),
    ],
)
def test_a_schedule_carries_the_finalize_that_ends_it(schedule, steps, monkeypatch):
    told = {name: [] for name in ("cluster", "finalize")}
    for name, calls in told.items():
        monkeypatch.setattr(module, name, lambda model, calls=calls, **options: calls.append(model))
    # The "model" of a call is the step, and what is returned is that call's.
    for step in range(-100, 130):
        schedule.cluster_if_due(step, step)
    assert told == {"cluster": steps[:-1], "finalize": steps[-1:]}
    assert [step for step in range(1, 130) if schedule.is_last(step, 100)] == steps[-1:]
    assert [step for step in range(-100, 130) if schedule.due(step)] == steps


@pytest.mark.parametrize("step", [0, -5, -30])
def test_nothing_is_due_before_the_first_step(step, monkeypatch):
    """A multiple of the interval is no reason, and 0 is no final step where there is none."""
    for name in ("cluster", "finalize"):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(name))
    for schedule in (
        ClusteringSchedule.every(5),
        ClusteringSchedule.every(5, final=30),
        ClusteringSchedule(frozenset({5}), 5),
        ClusteringSchedule.never(),
    ):
        assert not schedule.due(step) and not schedule.is_last(step, 100)
        assert schedule.cluster_if_due(None, step) is None


def test_numbers_of_any_kind_are_pythons_in_a_set():
    """As JSON and other ranks take them; a list or a set is none that stays as it is."""
    given = ClusteringSchedule([np.int64(3), 6], np.int32(4), torch.tensor(9))
    assert given == ClusteringSchedule(frozenset({3, 6}), 4, 9)
    assert hash(given) == hash(ClusteringSchedule({6, 3}, 4, 9))
    assert json.dumps([*sorted(given.steps), given.interval, given.final]) == "[3, 6, 4, 9]"
    for made in (
        lambda: ClusteringSchedule({2.5}),
        lambda: ClusteringSchedule.every(2.5),
        lambda: ClusteringSchedule.every(5, final="9"),
        lambda: ClusteringSchedule(7),
    ):
        with pytest.raises(ValueError, match=r"whole numbers of steps .*; convert them by int\(\)"):
            made()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClusteringSchedule.evenly(100, 0, finalize=True),
        lambda: ClusteringSchedule(final=-1),
        lambda: ClusteringSchedule.every(5, final=-5),
    ],
)
def test_a_finalize_that_never_comes_is_refused(make):
    with pytest.raises(ValueError, match=r"finalize=True and 0|final -\d"):
        make()


def test_options_reach_the_clustering(monkeypatch):
    monkeypatch.setattr(module, "cluster", lambda model, **options: options)
    schedule = ClusteringSchedule.every(2)
    assert schedule.cluster_if_due(None, 2, iterations=3) == {"iterations": 3, "recipes": None}
    assert schedule.cluster_if_due(None, 3, iterations=3) is None


@pytest.mark.parametrize(
    ("epochs", "steps", "rare", "expected"),
    [
        (1, 100, False, [10 * tenth for tenth in range(1, 9)]),
        (1, 1, False, [1]),
        (2, 100, False, [20 * part for part in range(1, 9)]),
        (3, 10, False, [2 * part for part in range(1, 13)]),
        (10, 100, False, [20 * part for part in range(1, 41)]),
        (1, 100, True, [30]),
        (1, 1, True, [1]),
        (2, 100, True, [50, 100]),
        (3, 10, True, [5, 10, 15, 20]),
        (10, 100, True, [50 * half for half in range(1, 19)]),
        (2, 1, True, [1]),
    ],
)
def test_schedule_for_training(epochs, steps, rare, expected):
    """Frequent ids four times an epoch and 8 times at least, rare ones twice, or once."""
    schedule = ClusteringSchedule.for_training(epochs, steps, rare=rare)
    assert sorted(schedule.steps) == expected and schedule.final == 0
    # Late, and not before it was clustered last: earlier it costs .005 in a single pass on flights.
    finalizes = ClusteringSchedule.for_training(epochs, steps, rare=rare, finalize=True)
    assert finalizes.steps == schedule.steps
    assert finalizes.final == max(expected[-1], round(0.9 * epochs * steps))


def table(num_helper_rows, **fields):
    fields = {"name": "t", "num_rows": 1, "recipe": "rare"} | fields
    return CCEEmbeddingBagConfig(
        num_embeddings=1000,
        embedding_dim=16,
        feature_names=["f"],
        num_helper_rows=num_helper_rows,
        **fields,
    )


def test_schedule_of_tables():
    """A single pass over rare ids has a restart where ids have few parameters, or codes."""
    plain = EmbeddingBagConfig(name="p", num_embeddings=9, embedding_dim=4, feature_names=["p"])
    few, many = table(78), table(79)  # 1.248 and 1.264 parameters an id
    restarted = ClusteringSchedule.for_training(1, 100, rare=True)
    never = ClusteringSchedule.never()
    for tables, expected in [
        ([plain, many], never),
        ([few], restarted),
        ([many, few], restarted),
        ([table(79, num_rows=2)], restarted),
        ([], ClusteringSchedule.for_training(1, 100)),
    ]:
        assert ClusteringSchedule.for_tables(tables, 1, 100) == expected
    hashed = table(0, num_rows=99, recipe="frequent", learned_codes=False)
    assert ClusteringSchedule.for_tables([many, hashed], 1, 100) == never
    assert ClusteringSchedule.for_tables([many], 1, 100, finalize=True) == never
    two = ClusteringSchedule.for_training(2, 100, rare=True)
    assert ClusteringSchedule.for_tables([many], 2, 100) == two
    with pytest.raises(ValueError, match="epochs 0 of 100 steps: there is nothing"):
        ClusteringSchedule.for_tables([many], 0, 100)


@pytest.mark.parametrize("finalize", [False, True])
@pytest.mark.parametrize(
    ("epochs", "helper_rows", "rare"), [(1, 78, [30]), (1, 79, []), (2, 79, [50, 100])]
)
def test_tables_of_both_kinds_have_each_their_own_schedule(epochs, helper_rows, rare, finalize):
    both = [table(helper_rows), table(60, name="u", recipe="frequent")]
    made = ClusteringSchedule.for_tables(both, epochs, 100, finalize=finalize)
    others = ClusteringSchedule.for_training(epochs, 100, finalize=finalize)
    assert made == replace(others, rare=frozenset(rare))
    total = 100 * epochs
    by_recipe = {
        recipe: [step for step in range(total + 1) if recipe in made.recipes_due(step)]
        for recipe in ("frequent", "rare")
    }
    assert by_recipe == {
        "frequent": [step for step in range(total + 1) if others.due(step)],
        "rare": rare,
    }
    assert [s for s in range(total + 1) if made.due(s)] == sorted({*by_recipe["frequent"], *rare})
    assert [s for s in range(1, total + 1) if made.is_last(s, total)] == by_recipe["frequent"][-1:]


def test_only_what_is_due_is_clustered(monkeypatch):
    monkeypatch.setattr(module, "cluster", lambda model, **options: options)
    monkeypatch.setattr(module, "finalize", lambda model, **options: {"finalize": options})
    made = ClusteringSchedule(frozenset({10, 20}), final=30, rare=frozenset({20, 25, 40}))
    asked = {step: made.cluster_if_due(None, step, iterations=1) for step in range(5, 41, 5)}
    assert asked == {
        5: None,
        10: {"iterations": 1, "recipes": {"frequent"}},
        15: None,
        20: {"iterations": 1, "recipes": {"frequent", "rare"}},
        25: {"iterations": 1, "recipes": {"rare"}},
        30: {"finalize": {"iterations": 1}},
        35: None,
        40: {"iterations": 1, "recipes": {"rare"}},
    }
    with pytest.raises(ValueError, match="recipes: the schedule says which are due"):
        made.cluster_if_due(None, 10, recipes=["rare"])
    for rare, told in (
        ({0, 3}, r"steps \[0\].* those of rare ids too"),
        ({1.5}, r"rare frozenset\(\{1.5\}\) are whole numbers"),
        ({2, 9}, "step 9 is the final one, which finalizes, and one of rare"),
    ):
        with pytest.raises(ValueError, match=told):
            ClusteringSchedule(final=9, rare=frozenset(rare))


@pytest.mark.parametrize("epochs", [10, 20, 30])
@pytest.mark.parametrize("steps", [1, 2, 100])
def test_no_clustering_of_rare_ids_falls_on_the_final_step(epochs, steps):
    """Nine tenths of training are one of their steps from 10 epochs on."""
    both = [table(79), table(60, name="u", recipe="frequent")]
    made = ClusteringSchedule.for_tables(both, epochs, steps, finalize=True)
    rare = ClusteringSchedule.for_training(epochs, steps, rare=True).steps
    assert made.rare == rare and made.final not in rare
    assert round(0.9 * epochs * steps) <= made.final <= epochs * steps
    assert steps < 100 or made.final <= 0.9 * epochs * steps + 1
    alone = ClusteringSchedule.for_tables(both[:1], epochs, steps, finalize=True)
    assert alone == ClusteringSchedule(rare)  # of which none is finalized


@pytest.mark.parametrize(("epochs", "steps"), [(0, 5), (5, 0), (-1, 5)])
def test_schedule_of_no_training(epochs, steps):
    for bad in (float("nan"), 2.5):
        with pytest.raises(ValueError, match=f"epochs {bad} is not a whole number"):
            ClusteringSchedule.for_training(bad, 10, rare=True)
    for call in (
        lambda: ClusteringSchedule.evenly(1e9),
        lambda: ClusteringSchedule.evenly(10, 2.5),
        lambda: ClusteringSchedule.at_epochs([1.5], 10),
        lambda: ClusteringSchedule.at_epochs([1], 10.5),
    ):
        with pytest.raises(ValueError, match="is not a whole number; round it"):
            call()
    with pytest.raises(ValueError, match="until nan is no finite number"):
        ClusteringSchedule.evenly(10, until=float("nan"))
    with pytest.raises(ValueError, match=f"epochs {epochs} of {steps} steps: there is nothing"):
        ClusteringSchedule.for_training(epochs, steps)
