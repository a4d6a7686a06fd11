"""What to make of the tables of a data set: what is counted, chosen and told."""

import math

import pytest
import torch

from cce_torchrec import CCEEmbeddingBagCollection, advise, id_counts
from cce_torchrec.config import is_cce
from cce_torchrec.data import Bags, Dataset, Rows
from cce_torchrec.planning import advice as advice_of
from cce_torchrec.planning.advice import explained_variance, head_share
from cce_torchrec.planning.loss_curves import CURVES

RARE, FREQUENT = CURVES


def counts(**changes):
    """Two rare features of which one has a hot id, a frequent one, and a small one."""
    hot = torch.ones(20_000, dtype=torch.int64)
    hot[7] = 30_000
    made = {
        "user": torch.full((30_000,), 2),
        "item": hot,
        "city": torch.full((3_000,), 500),
        "few": torch.full((50,), 900),
    }
    return made | changes


def test_what_is_told_of_ids():
    own = torch.zeros(400, dtype=torch.int64)
    own[:4], own[4:100] = 10, 1
    advice = advise(counts(user=own), embedding_dim=16, table_bytes=200_000, min_bytes=20_000)
    user, item, city, few = advice.tables
    assert (user.num_embeddings, user.trained_ids) == (400, 100)
    assert user.examples_per_id == pytest.approx(136 / 400)
    assert user.head_share == pytest.approx(40 / 136)
    # The hot id and 199 others of 20,000.
    assert item.head_share == pytest.approx((30_000 + 199) / 49_999)
    assert few.form == "full" and few.bytes == few.full_bytes == 50 * 64
    assert city.examples_per_id == 500 and city.form.startswith("CCE, frequent, ")


def test_a_budget_is_kept_and_the_tables_can_be_made():
    advice = advise(counts(), embedding_dim=16, table_bytes=300_000, min_bytes=20_000)
    user, item, city, _ = advice.tables
    assert user.form == item.form and "in 'joint', CE, 1 + " in user.form
    compressed = [config for config in advice.configs if is_cce(config)]
    assert [config.name for config in compressed] == ["joint", "city"]
    assert 290_000 < sum(config.table_bytes for config in compressed) <= 300_000
    assert sum(table.bytes for table in (user, item, city)) == pytest.approx(300_000, rel=0.04)
    made = CCEEmbeddingBagCollection(advice.configs, device="meta")
    assert made.output.names == ["user", "item", "city", "few"]
    full = 64 * 53_000
    expected = RARE.increase(sum(c.table_bytes for c in compressed) / full)
    assert advice.expected_increase == pytest.approx(expected, rel=1e-3)
    said = str(advice)
    assert "log loss rose by" in said and "flights" in said and "Other data differ" in said


def test_tables_of_a_product_stay_apart():
    advice = advise(
        counts(), embedding_dim=16, table_bytes=300_000, min_bytes=20_000, multiplies=True
    )
    assert [c.name for c in advice.configs] == ["user", "item", "city", "few"]
    assert {c.recipe for c in advice.configs if is_cce(c)} == {"frequent"}
    assert "MovieLens-1M" in advice.rests_on


def test_a_budget_that_holds_full_tables_compresses_none():
    full = 64 * 53_000
    for budget in (full, 10**12):
        advice = advise(counts(), embedding_dim=16, table_bytes=budget, min_bytes=20_000)
        assert {table.form for table in advice.tables} == {"full"}
        assert advice.expected_increase == 0.0 and "all tables stay full" in str(advice)
    advice = advise(counts(), embedding_dim=16, table_bytes=full - 1, min_bytes=20_000)
    assert any(is_cce(config) for config in advice.configs)


def test_features_called_as_no_table_may_be_keep_their_names():
    own = {"type": torch.full((9000,), 2), "user.id": torch.full((9000,), 3)}
    advice = advise(own, embedding_dim=16, table_bytes=100_000, min_bytes=20_000, multiplies=True)
    assert [table.name for table in advice.tables] == ["type", "user.id"]
    assert [config.name for config in advice.configs] == ["type_table", "user_id"]
    assert CCEEmbeddingBagCollection(advice.configs, device="meta").output.names == list(own)


@pytest.mark.parametrize("curve", CURVES)
def test_bytes_of_a_loss_and_loss_of_bytes(curve):
    for share, increase in curve.points:
        assert curve.increase(share) == pytest.approx(increase)
        assert curve.share(increase) == pytest.approx(share)
    (low, more), (high, less) = curve.points[0], curve.points[-1]
    between = (low * high) ** 0.5
    assert less < curve.increase(between) < more
    assert curve.share(curve.increase(between)) == pytest.approx(between)
    assert curve.increase(low / 9) == more and curve.increase(1.0) == less
    # Beyond what was measured: full tables, or the least bytes that were.
    assert curve.share(less / 9) == 1.0 and curve.share(more * 9) == pytest.approx(low)
    assert not curve.beyond(less) and not curve.beyond(more)


def test_bytes_follow_from_a_loss():
    settings = dict(embedding_dim=16, min_bytes=20_000)
    some = advise(counts(), loss_increase=0.01, **settings)
    less = advise(counts(), loss_increase=0.02, **settings)
    assert some.expected_increase == pytest.approx(0.01, rel=0.05)
    assert less.bytes < some.bytes
    frequent = {"a": torch.full((30_000,), 150)}
    assert "MovieLens-1M" in advise(frequent, loss_increase=0.03, **settings).rests_on


def test_a_loss_that_was_not_measured_is_told():
    settings = dict(embedding_dim=16, min_bytes=20_000)
    none = advise(counts(), loss_increase=1e-6, **settings)
    assert none.bytes == sum(table.full_bytes for table in none.tables)
    assert none.expected_increase == 0.0
    assert "1e-06 is less than any that was measured (0.00" in none.rests_on
    least = advise(counts(), loss_increase=5.0, **settings)
    assert "of 5 is more than any that was measured (0.02" in least.rests_on


def test_a_trained_table_is_compared_with_noise():
    centers = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    clustered = centers[torch.arange(20_000) % 20]
    settings = dict(embedding_dim=16, table_bytes=300_000, min_bytes=20_000)
    advice = advise(counts(), weights={"item": clustered}, **settings)
    item = advice.tables[1]
    assert item.explained > 0.99 and 0.8 < item.explained_of_noise < 0.97
    assert advice.tables[0].explained is None and "100% (noise 9" in str(advice)
    assert explained_variance(torch.zeros(30, 16), 4) == 1.0


def test_counts_of_a_data_set(monkeypatch):
    monkeypatch.setattr(advice_of, "_BATCH", 100)  # no whole number of which is in the examples
    ids = torch.tensor([[0, 2], [1, 2], [0, 0], [0, 2]] * 320)
    bags = Bags(torch.tensor([3, 3, 1] * 320), torch.tensor([2, 0, 1, 0] * 320))
    rows = Rows(torch.zeros(1280, 1), ids, torch.zeros(1280), (bags,))
    found = id_counts(Dataset("d", {"a": 2, "b": 4, "c": 5}, [], rows, rows))
    assert found["a"].tolist() == [960, 320] and found["b"].tolist() == [320, 0, 960, 0]
    assert found["c"].tolist() == [0, 320, 0, 640, 0]
    assert head_share(found["a"]) == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table_bytes": None}, "give one of table_bytes and loss_increase"),
        ({"loss_increase": 0.1}, "give one of table_bytes and loss_increase"),
        ({"min_bytes": 1 << 30}, "no table has 1,073,741,824 bytes or more"),
        ({"counts": {"a": torch.zeros(5)}}, r"counts of 'a' are torch.float32 \[5\]; give"),
        ({"counts": {"a": torch.tensor([-1])}}, "a number of examples, 0 or more, for each id"),
        ({"weights": {"usr": torch.zeros(5, 16)}}, r"weights of 'usr', and counts of \['city'"),
        ({"weights": {"city": torch.zeros(5, 16)}}, r"\[5, 16\]; give \[3000, 16\], a row"),
        ({"table_bytes": 10}, "table_bytes 10 does not hold"),
        ({"table_bytes": math.nan}, "table_bytes nan is no finite number"),
        ({"table_bytes": None, "loss_increase": math.nan}, "loss_increase nan is no finite"),
        ({"table_bytes": None, "loss_increase": 0.0}, "loss_increase 0.0 must be positive"),
        ({"min_bytes": "20k"}, "min_bytes '20k' is no finite number"),
        ({"embedding_dim": 0}, "embedding_dim 0 must be 1 or more"),
        ({"embedding_dim": 6}, "cannot be compressed: 'user' .embedding_dim 6 is not a multiple"),
        ({"num_chunks": 0}, "num_chunks 0 must be 1 or more"),
        ({"counts": {"a": [1, 2]}}, "'a' has a list; give tensors"),
        ({"weights": {"city": [1]}}, "'city' has a list; give tensors"),
    ],
)
def test_what_is_refused(changes, message):
    settings = dict(embedding_dim=16, table_bytes=300_000, min_bytes=20_000)
    own = changes.get("counts", counts())
    rest = {key: value for key, value in changes.items() if key != "counts"}
    with pytest.raises(ValueError, match=message):
        advise(own, **{**settings, **rest})
