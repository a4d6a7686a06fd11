"""Tables of the training program: which features share one, and what it gets of the budget."""

from types import SimpleNamespace

import pytest

from cce_torchrec import CCEEmbeddingBagCollection
from cce_torchrec.config import is_cce
from cce_torchrec.train import options
from cce_torchrec.train.model import Compression, chunks_by_default, refuse_to_finalize_none, tables

DATA = SimpleNamespace(
    features={"few": 3, "rare": 900, "often": 40, "rarer": 2000},
    compressed=["rare", "often", "rarer"],
    num_train=8000,
)
"""8.9, 200 and 4 examples an id of those that are compressed."""


def made(**changes):
    settings = dict(
        method="cce",
        num_chunks=4,
        rows={"rare": 45, "often": 4, "rarer": 100},
        num_rows=None,
        table_bytes={},
        finalize=False,
        recipe="auto",
        joint="rare",
        multiplies=False,
        seed=3,
    )
    return tables(DATA, Compression(**{**settings, **changes}), dim=16, init_bound=None)


def features(configs):
    return [config.feature_names for config in configs]


def test_rare_features_share_a_table_at_the_place_of_the_first():
    few, joint, often = made()
    assert features([few, joint, often]) == [["few"], ["rare", "rarer"], ["often"]]
    assert not is_cce(few) and often.recipe == "frequent" and often.id_ranges is None
    assert joint.recipe == "rare" and joint.seed == 3
    assert joint.id_ranges == {"rare": range(900), "rarer": range(900, 2900)}
    assert joint.rows_per_chunk == 145
    assert joint.examples_per_id == pytest.approx(2 * 8000 / 2900)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"joint": "no"}, [["few"], ["rare"], ["often"], ["rarer"]]),
        ({"joint": "all"}, [["few"], ["rare", "often", "rarer"]]),
        ({"recipe": "frequent"}, [["few"], ["rare"], ["often"], ["rarer"]]),
        ({"recipe": "rare"}, [["few"], ["rare", "often", "rarer"]]),
        ({"method": "ce"}, [["few"], ["rare", "rarer"], ["often"]]),
        ({"method": "ce", "recipe": "frequent"}, [["few"], ["rare"], ["often"], ["rarer"]]),
        ({"method": "ce", "joint": "all"}, [["few"], ["rare", "often", "rarer"]]),
        ({"method": "full", "joint": "all"}, [["few"], ["rare"], ["often"], ["rarer"]]),
    ],
)
def test_who_shares(changes, expected):
    assert features(made(**changes)) == expected


def test_a_joint_table_has_the_bytes_of_its_features():
    shares = {"rare": 9_000, "often": 3_000, "rarer": 20_000}
    _, joint, often = made(table_bytes=shares)
    assert 28_000 < joint.table_bytes <= 29_000 and often.table_bytes <= 3_000
    hashed = made(table_bytes=shares, method="hash", joint="all")[1]
    assert hashed.num_rows == 149 and hashed.num_chunks == 1 and hashed.helper_rows == 0


def test_a_run_of_before_there_were_joint_tables_is_resumed_as_it_was(tmp_path):
    saved = {"epochs": 2}
    options.check_same(saved, {"epochs": 2, "joint": "no", "recipe": "frequent"}, tmp_path)
    with pytest.raises(ValueError, match="--joint was no and is rare"):
        options.check_same(saved, {"epochs": 2, "joint": "rare", "recipe": "frequent"}, tmp_path)


def test_a_network_that_multiplies_two_features_has_them_apart():
    assert options.parse(["--model", "gmf", "--dataset", "ml-1m"]).joint == "no"
    assert options.parse([]).joint == "rare" and options.parse([]).recipe == "auto"
    assert options.parse(["--joint", "all"]).joint == "all"


def test_under_a_product_of_two_embeddings_no_ids_are_rare():
    _, *rest = made(multiplies=True)
    assert features(rest) == [["rare"], ["often"], ["rarer"]]
    assert all(t.recipe == "frequent" and t.track_counts for t in rest)
    assert [t.examples_per_id for t in rest] == [pytest.approx(8000 / n) for n in (900, 40, 2000)]
    assert not any(t.track_counts for t in made(multiplies=True, recipe="frequent")[1:])
    assert {t.recipe for t in made(multiplies=True, recipe="rare", joint="no")[1:]} == {"rare"}


def test_main_rows_that_were_asked_for_are_given_whatever_the_recipe():
    _, joint, often = made(num_rows=20)
    assert (joint.num_rows, joint.helper_rows) == (40, 120) and joint.recipe == "rare"
    assert (often.num_rows, often.helper_rows) == (20, 60)


def test_a_feature_called_joint(monkeypatch):
    features = {"joint": 3, **{k: v for k, v in DATA.features.items() if k != "few"}}
    monkeypatch.setattr(DATA, "features", features)
    assert [config.name for config in made()] == ["joint", "joint1", "often"]


def test_features_called_as_no_table_may_be(monkeypatch):
    sizes = {"type": 3, "user.id": 900, "a#b": 2000, "user_id": 50, "items": 40}
    monkeypatch.setattr(DATA, "features", sizes)
    monkeypatch.setattr(DATA, "compressed", list(sizes)[1:])
    configs = made(rows=dict.fromkeys(sizes, 30), joint="no")
    assert features(configs) == [[name] for name in sizes]
    names = ["type_table", "user_id_", "a_b", "user_id", "items_table"]
    assert [config.name for config in configs] == names
    model = CCEEmbeddingBagCollection(configs, device="meta")
    assert model.output.names == list(sizes)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("--table-bytes 188160", "2,940 rows in 188,160 bytes; take --method full, or a smaller"),
        ("--table-bytes 100000000", "holds the full tables of .'rare', 'often', 'rarer'., 2,940"),
        ("--compression 1", "--compression 1.0 holds the full tables"),
        ("--params-per-dim 980", "--params-per-dim 980 holds the full tables"),
        ("--num-rows 245", "--num-rows 245 holds the full tables"),
        ("--params-per-dim 1", "1: tables .'rare', 'often', 'rarer'. get less than two rows"),
        ("--table-bytes 0", "0: tables .* get less than two rows, .* 9,408 bytes are the least"),
        ("--table-bytes 9407", "tables .'often'. get less than two rows"),
    ],
)
def test_budgets_that_no_tables_can_have(asked, message):
    args = options.parse(asked.split())
    with pytest.raises(ValueError, match=message):
        options.rows_per_table(args, DATA)


@pytest.mark.parametrize("asked", ["188159", "9408"])
def test_budgets_that_tables_can_have(asked):
    args = options.parse(["--table-bytes", asked])
    assert min(options.rows_per_table(args, DATA).values()) >= 2


def test_finalizing_needs_a_table_that_can_be():
    refuse_to_finalize_none(made())
    with pytest.raises(ValueError, match="--finalize: all compressed tables are of rare ids"):
        refuse_to_finalize_none(made(recipe="rare"))


def test_tables_that_will_be_finalized_have_a_quarter_of_their_rows_in_main():
    """Of fewer, codes that tell all rows apart are many times as wide, and over the budget."""
    sizes = {"rare": 200_000, "often": 100_000, "rarer": 100_000}
    shapes = [
        [table for table in made(table_bytes=sizes, joint="no", recipe="frequent", finalize=last)]
        for last in (False, True)
    ]
    for as_is, to_finalize in zip(*shapes, strict=True):
        if as_is.name in sizes:
            assert abs(3 * to_finalize.num_rows - to_finalize.num_helper_rows) <= 2
            assert to_finalize.finalized().table_bytes <= sizes[as_is.name]
            assert as_is.finalized().table_bytes > sizes[as_is.name]


@pytest.mark.parametrize(
    ("arguments", "chunks"),
    [
        (["--params-per-dim", "64", "--embedding-dim", "32"], 8),
        (["--params-per-dim", "64"], 4),
        (["--table-bytes", "100000", "--embedding-dim", "32"], None),
        (["--table-bytes", "100000", "--embedding-dim", "32", "--method", "ce"], 8),
        (["--embedding-dim", "32"], 4),
    ],
)
def test_chunks_of_a_run_that_names_none(arguments, chunks):
    args = options.parse(arguments)
    assert args.num_chunks is None and chunks_by_default(args) == chunks
