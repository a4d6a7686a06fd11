"""compress_model: what it replaces, what it keeps, and what it refuses."""

from functools import partial

import pytest
import torch
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.fx import symbolic_trace
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_tower import EmbeddingTower
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection
from torchrec.modules.itep_modules import GenericITEPModule
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    cluster,
    compress_model,
    finalize,
    joint_table,
)
from cce_torchrec.config import is_cce

SIZES = {"user": 50_000, "item": 20_000, "country": 200}


def dlrm(dim=32, **kwargs):
    tables = [
        EmbeddingBagConfig(
            name=name, num_embeddings=size, embedding_dim=dim, feature_names=[f"f_{name}"], **kwargs
        )
        for name, size in SIZES.items()
    ]
    return DLRM(EmbeddingBagCollection(tables=tables), 4, [8, dim], [8, 1])


def batch():
    ids = torch.tensor([49_999, 3, 19_999, 4, 199, 0])
    keys = [f"f_{name}" for name in SIZES]
    return torch.randn(2, 4), KeyedJaggedTensor(keys=keys, values=ids, lengths=torch.ones(6).int())


def test_large_tables_are_replaced_and_the_model_still_runs():
    model = dlrm()
    country = model.sparse_arch.embedding_bag_collection.embedding_bags["country"].weight.clone()
    report = compress_model(model, compression=50)
    made = model.sparse_arch.embedding_bag_collection
    assert isinstance(made, CCEEmbeddingBagCollection)
    configs = {c.name: c for c in made.embedding_bag_configs()}
    assert list(configs) == list(SIZES)
    assert isinstance(configs["user"], CCEEmbeddingBagConfig)
    assert configs["user"].rows_per_chunk == 1000
    assert type(configs["country"]) is EmbeddingBagConfig
    kept = made.embedding_bag_collection.embedding_bags["country"].weight
    assert torch.equal(kept, country)
    assert model(*batch()).shape == (2, 1)
    assert report.full_bytes == sum(SIZES.values()) * 32 * 4
    # 250 main rows: one byte a code; 100 and 300 rows for items.
    expected = 1000 * 32 * 4 + 50_000 * 4 + 400 * 32 * 4 + 20_000 * 4 + 200 * 32 * 4
    assert report.bytes == expected
    assert "country" in str(report) and "times fewer" in str(report)


# Below, between and beyond the budgets at which codes get a bit more.
@pytest.mark.parametrize("budget", [8_000, 40_000, 117_000, 196_000, 400_000, 1_000_000, 5_000_000])
def test_byte_budget_is_kept_and_used(budget):
    report = compress_model(dlrm(), tables=["user", "item"], table_bytes=budget)
    used = sum(t.bytes for t in report.tables if t.num_rows)
    assert 0.99 * budget - 2 * 32 * 4 <= used <= budget  # but for a row of each table


def test_rows_pooling_init_and_width_are_kept():
    model = dlrm(20, pooling=PoolingType.MEAN, init_fn=partial(nn.init.constant_, val=0.5))
    report = compress_model(model, num_rows=16, tables=["item"])
    by_name = {t.name: t for t in report.tables}
    assert by_name["item"].num_chunks == 1  # 20 over 4 chunks would be 5 wide; 4 x 5 = 20 by 1
    assert by_name["user"].reason == "not chosen"
    config = model.sparse_arch.embedding_bag_collection.embedding_bag_configs()[1]
    assert config.pooling == PoolingType.MEAN and config.num_rows == 16
    out = model.sparse_arch(batch()[1])
    assert torch.allclose(out[:, 1], torch.full((2, 20), 0.5))


def test_tables_that_would_grow_stay_full():
    report = compress_model(dlrm(8), tables=["user", "country"], num_rows=100)
    reasons = {t.name: t.reason for t in report.tables}
    assert not reasons["user"] and "would take" in reasons["country"]


def test_a_collection_in_several_places_is_replaced_in_all():
    model, other = dlrm(), nn.Module()
    model.again = nn.ModuleList([model.sparse_arch.embedding_bag_collection])
    other.first, other.second = model, model.sparse_arch
    report = compress_model(other, compression=50)
    made = model.sparse_arch.embedding_bag_collection
    assert isinstance(made, CCEEmbeddingBagCollection) and model.again[0] is made
    assert len(report.tables) == len(SIZES)


def test_a_call_that_fails_replaces_nothing():
    model = nn.ModuleList([dlrm(), applied()])
    before = list(model.modules())
    with pytest.raises(ValueError, match="call compress_model first"):
        compress_model(model, compression=50)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_frozen_tables_stay_frozen():
    model = dlrm().requires_grad_(False)
    compress_model(model, compression=50)
    inner = model.sparse_arch.embedding_bag_collection.embedding_bag_collection
    assert not inner.embedding_bags["country"].weight.requires_grad


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.dlrm = dlrm()


def applied():
    model = dlrm()
    apply_optimizer_in_backward(torch.optim.SGD, list(model.parameters()), {"lr": 0.1})
    return model


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: compress_model(dlrm()), "exactly one of"),
        (lambda: compress_model(dlrm(), compression=5, num_rows=5), "exactly one of"),
        (lambda: compress_model(dlrm(), compression=0), "compression 0 must be positive"),
        (lambda: compress_model(dlrm(), compression=float("nan")), "compression nan is no finite"),
        (lambda: compress_model(dlrm(), compression=5, num_chunks=0), "num_chunks 0 must be 1"),
        (lambda: compress_model(dlrm(), table_bytes=5, num_chunks=0), "num_chunks 0 must be 1"),
        (lambda: compress_model(dlrm(), table_bytes=float("nan")), "table_bytes nan is no finite"),
        (lambda: compress_model(dlrm(), compression=5, min_bytes=None), "min_bytes None is no"),
        (lambda: compress_model(dlrm(), table_bytes="1MB"), "table_bytes '1MB' is no finite"),
        (
            lambda: compress_model(dlrm(), table_bytes=10**5, examples_per_id=3.0),
            "examples_per_id 3.0 is no mapping",
        ),
        (
            lambda: compress_model(
                dlrm(), compression=5, multiplies=True, examples_per_id={"user": float("nan")}
            ),
            "table 'user': examples_per_id nan is no finite number of 0 or more",
        ),
        (lambda: compress_model(dlrm(), compression=5, tables=["usr"]), r"no tables \['usr'\]"),
        (lambda: compress_model(nn.Linear(2, 2), compression=5), "nothing to compress"),
        (lambda: compress_model(dlrm(), compression=5, min_bytes=10**9), "nothing to compress"),
        (
            lambda: compress_model(dlrm(), table_bytes=100),
            "does not hold two rows of each of 2 tables",
        ),
        (lambda: compress_model(applied(), compression=50), "call compress_model first"),
        (
            lambda: compress_model(dlrm().sparse_arch.embedding_bag_collection, compression=50),
            "EmbeddingBagCollection itself",
        ),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_budget_that_holds_the_full_tables_leaves_them(caplog):
    model = dlrm()
    chosen = compress_model(dlrm(), compression=50, verbose=False).tables
    full = sum(table.full_bytes for table in chosen if table.num_rows)
    report = compress_model(model, table_bytes=full, verbose=False)
    assert {t.reason for t in report.tables} == {
        "table_bytes holds all that were chosen in full", "not chosen",
    }  # fmt: skip
    assert type(model.sparse_arch.embedding_bag_collection) is EmbeddingBagCollection
    assert "nothing was compressed" in caplog.text
    less = compress_model(dlrm(), table_bytes=full - 1, verbose=False)
    assert sum(table.bytes for table in less.tables if table.num_rows) < full


def test_the_report_is_printed_and_has_paths(capsys):
    report = compress_model(Wrapped(), compression=50)
    assert capsys.readouterr().out == f"{report}\n"
    compress_model(Wrapped(), compression=50, verbose=False)
    assert not capsys.readouterr().out
    assert report.tables[0].collection == "dlrm.sparse_arch.embedding_bag_collection"


class Subclass(EmbeddingBagCollection):
    pass


class SequenceSubclass(EmbeddingCollection):
    pass


def bag_config(**kwargs):
    return EmbeddingBagConfig(
        name="other", num_embeddings=5000, embedding_dim=8, feature_names=["f_other"], **kwargs
    )


def sequence_config(name="other", size=5000):
    return EmbeddingConfig(
        name=name, num_embeddings=size, embedding_dim=8, feature_names=[f"f_{name}"]
    )


def managed():
    config = bag_config()
    collisions = ManagedCollisionCollection(
        {
            "other": MCHManagedCollisionModule(
                zch_size=5000,
                device=torch.device("cpu"),
                eviction_policy=DistanceLFU_EvictionPolicy(),
                eviction_interval=10,
            )
        },
        [config],
    )
    collection = EmbeddingBagCollection(tables=[config])
    return ManagedCollisionEmbeddingBagCollection(collection, collisions)


def pruned():
    return ITEPEmbeddingBagCollection(
        EmbeddingBagCollection(tables=[bag_config()]), GenericITEPModule({"other": 5000}, {})
    )


LEFT_ALONE = {
    "a subclass": (lambda: Subclass(tables=[bag_config()]), "Subclass may do more"),
    "a subclass of sequences": (
        lambda: SequenceSubclass(tables=[sequence_config()]),
        "SequenceSubclass may do more",
    ),
    "a fused collection": (
        lambda: FusedEmbeddingBagCollection([bag_config()], torch.optim.SGD, {"lr": 0.1}),
        "FusedEmbeddingBagCollection may do more",
    ),
    "managed collision": (managed, "managed collision rewrites rows"),
    "pruning in training": (pruned, "in-training pruning takes rows"),
    "a tower": (
        lambda: EmbeddingTower(EmbeddingBagCollection(tables=[bag_config()]), nn.Identity()),
        "an embedding tower",
    ),
    "an embedding of torch": (lambda: nn.Embedding(5000, 8), "an nn.Embedding of its own"),
    "bags of torch": (lambda: nn.EmbeddingBag(5000, 8), "an nn.EmbeddingBag of its own"),
    "an option": (
        lambda: EmbeddingBagCollection(tables=[bag_config(need_pos=True)]),
        "need_pos=True has no meaning",
    ),
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_what_is_left_alone_is_in_the_report_with_the_reason(kind):
    make, reason = LEFT_ALONE[kind]
    model = dlrm()
    model.other = make()
    before = model.other
    report = compress_model(model, compression=50, min_bytes=100_000, verbose=False)
    assert model.other is before
    last = report.tables[-1]
    assert last.name == "other" and reason in last.reason and not last.num_rows
    assert last.bytes == last.full_bytes == 5000 * 8 * 4
    assert sum(table.num_rows > 0 for table in report.tables) == 2  # user and item


def test_a_named_table_that_would_be_left_alone_is_refused():
    model = dlrm()
    model.side = Subclass(tables=[bag_config()])
    with pytest.raises(ValueError, match="table 'other' of 'side' stays: Subclass may do more"):
        compress_model(model, compression=50, tables=["user", "other"])
    assert type(model.sparse_arch.embedding_bag_collection) is EmbeddingBagCollection


def sequences():
    return EmbeddingCollection(
        tables=[sequence_config("click", 50_000), sequence_config("kind", 30)], need_indices=True
    )


def test_sequences_are_compressed():
    model = nn.ModuleDict({"sequences": sequences(), "pooled": dlrm()})
    kind = model["sequences"].embeddings["kind"].weight.clone()
    report = compress_model(model, compression=50, verbose=False)
    made = model["sequences"]
    assert isinstance(made, CCEEmbeddingCollection) and made.need_indices()
    assert [t.name for t in report.tables if t.num_rows] == ["click", "user", "item"]
    features = KeyedJaggedTensor(
        keys=["f_click", "f_kind"],
        values=torch.tensor([49_999, 3, 29]),
        lengths=torch.tensor([2, 0, 0, 1]),
    )
    out = made(features)
    assert out["f_click"].values().shape == (2, 8)
    assert torch.equal(out["f_kind"].values(), kind[[29]])
    assert out["f_kind"].weights().tolist() == [29]


def test_one_byte_budget_holds_bags_and_sequences():
    model = nn.ModuleDict({"sequences": sequences(), "pooled": dlrm()})
    report = compress_model(model, table_bytes=1_000_000, verbose=False)
    used = sum(t.bytes for t in report.tables if t.num_rows)
    assert 900_000 <= used <= 1_000_000


def test_a_second_call_compresses_more_and_keeps_what_is_compressed():
    model = dlrm()
    compress_model(model, compression=50, tables=["user"], verbose=False)
    cluster(model)
    before = model.sparse_arch(batch()[1])
    report = compress_model(model, compression=50, tables=["item"], verbose=False)
    reasons = {table.name: table.reason for table in report.tables}
    assert reasons == {"user": "compressed already", "item": "", "country": "not chosen"}
    configs = model.sparse_arch.embedding_bag_collection.embedding_bag_configs()
    assert [is_cce(config) for config in configs] == [True, True, False]
    after = model.sparse_arch(batch()[1])
    assert torch.equal(after[:, 0], before[:, 0]) and torch.equal(after[:, 2], before[:, 2])
    assert not torch.equal(after[:, 1], before[:, 1])


def test_a_second_call_keeps_a_finalized_table():
    model = nn.ModuleDict({"sequences": sequences(), "pooled": dlrm()})
    compress_model(model, compression=50, tables=["click"], verbose=False)
    finalize(model)
    made = model["sequences"]
    compress_model(model, compression=50, tables=["kind", "user"], num_chunks=1, verbose=False)
    click = model["sequences"].embedding_configs()[0]
    assert click.num_helper_rows == 0
    ids = KeyedJaggedTensor(
        keys=["f_click", "f_kind"], values=torch.arange(99), lengths=torch.tensor([99, 0])
    )
    found = model["sequences"](ids)["f_click"].values()
    assert torch.equal(found, made(ids)["f_click"].values())


@pytest.mark.parametrize("tables", [None, ["user", "item"]])
def test_the_same_call_again_changes_nothing_and_says_so(tables, caplog):
    model = dlrm()
    compress_model(model, compression=50, tables=tables, verbose=False)
    before = list(model.modules())
    report = compress_model(model, compression=50, tables=tables, verbose=False)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))
    assert [table.reason for table in report.tables[:2]] == ["compressed already"] * 2
    assert "nothing was compressed" in caplog.text


def test_tables_of_rare_ids_are_told_by_their_examples():
    """They have no codes within a budget of bytes."""
    budget = {"table_bytes": 4000, "min_bytes": 1, "verbose": False}
    rare = next(t.name for t in compress_model(dlrm(), **budget).tables if not t.reason)
    model = dlrm()
    report = compress_model(model, examples_per_id={rare: 2.0}, **budget)
    collections = [m for m in model.modules() if isinstance(m, CCEEmbeddingBagCollection)]
    configs = {c.name: c for made in collections for c in made.embedding_bag_configs()}
    assert configs[rare].recipe == "rare" and configs[rare].num_rows == 1
    assert sum(t.bytes for t in report.tables if not t.reason) <= 4000
    with pytest.raises(ValueError, match=r"examples_per_id has \['usr'\], which are not comp"):
        compress_model(dlrm(), compression=5, min_bytes=1, examples_per_id={"usr": 2.0})


@pytest.mark.parametrize(
    ("budget", "examples", "chunks"),
    [
        ({"table_bytes": 20_000}, 2.0, 8),
        ({"table_bytes": 20_000}, 200.0, 4),
        ({"table_bytes": 20_000, "num_chunks": 2}, 2.0, 2),
        ({"compression": 10}, 2.0, 4),
        ({"num_rows": 16}, 2.0, 4),
    ],
)
def test_chunks_where_nobody_says_how_many(budget, examples, chunks):
    """Where a budget of bytes leaves codes out, chunks cost none."""
    table = EmbeddingBagConfig(
        name="t", num_embeddings=1_000, embedding_dim=64, feature_names=["t"]
    )
    model = nn.ModuleDict({"ebc": EmbeddingBagCollection([table])})
    compress_model(model, examples_per_id={"t": examples}, min_bytes=1, verbose=False, **budget)
    [made] = model["ebc"].embedding_bag_configs()
    assert made.num_chunks == chunks


def joint_model(pooling=PoolingType.SUM):
    """Tables a and d may be one; b differs in dim, and c shares a feature with e."""
    shape = dict(embedding_dim=16, pooling=pooling)
    configs = [
        EmbeddingBagConfig(name="a", num_embeddings=900, feature_names=["fa", "ga"], **shape),
        EmbeddingBagConfig(name="b", num_embeddings=500, feature_names=["fb"], embedding_dim=8),
        EmbeddingBagConfig(name="c", num_embeddings=700, feature_names=["fc"], **shape),
        EmbeddingBagConfig(name="d", num_embeddings=300, feature_names=["fd"], **shape),
        EmbeddingBagConfig(name="e", num_embeddings=40, feature_names=["fc"], **shape),
    ]
    return nn.ModuleDict({"ebc": EmbeddingBagCollection(tables=configs)})


JOINT_KEYS = ["fa", "ga", "fb", "fc@c", "fd", "fc@e"]


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_joint_tables_keep_ids_and_the_order_of_the_output(pooling):
    torch.manual_seed(0)
    model = joint_model(pooling)
    features = KeyedJaggedTensor(
        ["fa", "ga", "fb", "fc", "fd"], torch.arange(10) % 40, lengths=torch.ones(10).int()
    )
    before = model["ebc"](features)
    report = compress_model(
        model, tables=["a", "b", "c", "d"], compression=10, joint="all", verbose=False
    )
    after = model["ebc"](features)
    assert before.keys() == after.keys() == JOINT_KEYS
    assert before.length_per_key() == after.length_per_key()
    configs = {c.name: c for c in model["ebc"].embedding_bag_configs()}
    assert list(configs) == ["joint", "b", "c", "e"]
    joint = configs["joint"]
    first = range(900)
    assert joint.id_ranges == {"fa": first, "ga": first, "fd": range(900, 1200)}
    assert joint.rows_per_chunk == 120 and joint.pooling == pooling
    assert torch.equal(after["fc@e"], before["fc@e"])  # a plain table keeps its weights
    # By position, as models read it too.
    parts = after.values().split(after.length_per_key(), dim=1)
    for name, part in zip(JOINT_KEYS, parts, strict=True):
        assert torch.equal(after[name], part)
    graph = symbolic_trace(model["ebc"])(features)
    assert graph.keys() == JOINT_KEYS
    torch.testing.assert_close(graph.values(), after.values())
    rows = {table.name: table for table in report.tables}
    assert rows["a"].joint == rows["d"].joint == "joint" and not rows["c"].joint
    assert rows["a"].bytes + rows["d"].bytes == joint.table_bytes
    assert report.bytes == sum(
        c.table_bytes if is_cce(c) else 4 * c.num_embeddings * c.embedding_dim
        for c in configs.values()
    )
    assert "in 'joint'" in str(report)


def test_a_second_call_keeps_the_order():
    model = joint_model()
    compress_model(model, tables=["a", "d"], compression=10, joint="all", verbose=False)
    compress_model(model, tables=["b"], compression=10, verbose=False)
    assert model["ebc"].output.keys == JOINT_KEYS


@pytest.mark.parametrize("budget", [{"table_bytes": 20_000}, {"num_rows": 5}])
def test_joint_tables_of_rare_ids(budget):
    model = joint_model()
    examples = {"a": 2.0, "c": 5000.0, "d": 6.0}
    report = compress_model(
        model,
        tables=["a", "c", "d"],
        examples_per_id=examples,
        joint="rare",
        verbose=False,
        **budget,
    )
    configs = {c.name: c for c in model["ebc"].embedding_bag_configs()}
    assert list(configs) == ["joint", "b", "c", "e"]
    assert configs["joint"].recipe == "rare" and configs["c"].recipe == "frequent"
    assert configs["joint"].examples_per_id == pytest.approx((2 * 900 + 6 * 300) / 1200)
    if "table_bytes" in budget:
        used = sum(table.bytes for table in report.tables if table.num_rows)
        assert 19_000 < used <= 20_000
    else:
        assert configs["joint"].num_rows == 10 and configs["c"].num_rows == 5


def test_under_a_product_of_two_embeddings_no_ids_are_rare():
    model = joint_model()
    settings = dict(compression=10, multiplies=True, verbose=False)
    compress_model(model, tables=["a", "d"], examples_per_id={"a": 2.0}, **settings)
    a, d = (c for c in model["ebc"].embedding_bag_configs() if c.name in "ad")
    assert (a.recipe, a.track_counts, a.examples_per_id) == ("frequent", True, 2.0)
    assert (d.recipe, d.track_counts) == ("frequent", False)
    with pytest.raises(ValueError, match="joint='all' and multiplies=True: a row that both"):
        compress_model(joint_model(), tables=["a", "d"], joint="all", **settings)


def test_a_joint_table_takes_a_name_that_is_free():
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=90, embedding_dim=16, feature_names=[name])
        for name in ("x", "joint", "y")
    ]
    model = nn.ModuleDict({"ebc": EmbeddingBagCollection(tables=configs)})
    compress_model(model, tables=["x", "y"], compression=10, joint="all", verbose=False)
    assert [c.name for c in model["ebc"].embedding_bag_configs()] == ["joint1", "joint"]
    assert model["ebc"].output.keys == ["x", "joint", "y"]


def test_joint_tables_of_sequences():
    names = ["x", "between", "y"]
    configs = [
        EmbeddingConfig(name=name, num_embeddings=90, embedding_dim=16, feature_names=[name])
        for name in names
    ]
    model = nn.ModuleDict({"ec": EmbeddingCollection(tables=configs)})
    kjt = KeyedJaggedTensor(names, torch.tensor([89, 5, 3]), lengths=torch.ones(3).int())
    before = model["ec"](kjt)
    compress_model(model, tables=["x", "y"], compression=10, joint="all", verbose=False)
    after = model["ec"](kjt)
    assert list(after) == list(before) == names
    assert torch.equal(after["between"].values(), before["between"].values())
    joint = model["ec"].embedding_configs()[0]
    assert joint.num_embeddings == 180 and joint.id_ranges["y"] == range(90, 180)
    compress_model(model, tables=["between"], compression=10, verbose=False)
    assert list(model["ec"](kjt)) == names


def plain(name, ids=900, **changes):
    shape = dict(num_embeddings=ids, embedding_dim=16, feature_names=[name])
    return EmbeddingBagConfig(name=name, **{**shape, **changes})


def test_names_of_joint_tables_are_unique_in_a_model():
    model = nn.ModuleDict(
        {
            key: EmbeddingBagCollection(tables=[plain(f"{key}{i}") for i in range(2)])
            for key in ("left", "right")
        }
    )
    compress_model(model, compression=10, joint="all", min_bytes=1, verbose=False)
    names = [c.name for key in model for c in model[key].embedding_bag_configs()]
    assert names == ["joint", "joint1"]


@pytest.mark.parametrize(
    "change",
    [{"num_embeddings_post_pruning": 10}, {"need_pos": True}, {"data_type": DataType.INT8}],
)
def test_a_table_that_has_no_cce_form_is_not_joined(change):
    tables = [plain("a", **change), plain("b"), plain("c")]
    model = nn.ModuleDict({"ebc": EmbeddingBagCollection(tables=tables)})
    report = compress_model(model, compression=10, joint="all", min_bytes=1, verbose=False)
    assert [c.name for c in model["ebc"].embedding_bag_configs()] == ["a", "joint"]
    assert report.tables[0].reason.startswith("table 'a'")
    if "data_type" not in change:
        with pytest.raises(ValueError, match=f"table 'a': {next(iter(change))}="):
            joint_table(tables)


def test_tables_are_apart_where_one_would_not_be_smaller():
    tables = [plain("large", 40_000), *(plain(f"small{i}", 200) for i in range(25))]
    model = nn.ModuleDict({"ebc": EmbeddingBagCollection(tables=tables)})
    report = compress_model(model, num_rows=500, joint="all", min_bytes=1, verbose=False)
    assert [table.name for table in report.tables if table.num_rows] == ["large"]


@pytest.mark.parametrize("budget", [100_000, 500, 450])
def test_a_budget_of_bytes_is_that_of_the_tables_that_are_made(budget):
    tables = [plain("a", 30_000), plain("b", 20_000), plain("c", 10_000)]
    tables.append(plain("d", 50, feature_names=["a", "d"]))  # so "a" is by itself
    model = nn.ModuleDict({"ebc": EmbeddingBagCollection(tables=tables)})
    options = dict(tables=["b", "c"] if budget < 1000 else ["a", "b", "c"], joint="all")
    examples = dict.fromkeys(options["tables"], 5.0)
    report = compress_model(
        model, table_bytes=budget, examples_per_id=examples, verbose=False, **options
    )
    used = sum(table.bytes for table in report.tables if table.num_rows)
    assert 0.8 * budget < used <= budget


def test_room_for_more_ids():
    fields = joint_table((plain(name, 100) for name in "ab"), room=0.5)
    assert fields["id_ranges"] == {"a": range(100), "b": range(150, 250)}
    assert fields["num_embeddings"] == 300
    with pytest.raises(ValueError, match="room -1 is no finite number of 0 or more"):
        joint_table([plain("a"), plain("b")], room=-1)


def test_joining_needs_to_know_what_is_rare():
    with pytest.raises(ValueError, match="joint 'some' is none of"):
        compress_model(joint_model(), tables=["a"], compression=9, joint="some")
    with pytest.raises(ValueError, match="joint='rare' goes by the examples of an id; give"):
        compress_model(joint_model(), tables=["a"], compression=9, joint="rare")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_dim": 32}, "table 'one': embedding_dim of 'a' is 16, and of 'b' 32; join"),
        ({"pooling": PoolingType.MEAN}, "pooling of 'a' is PoolingType.SUM, and of 'b'"),
        ({"feature_names": ["fa"]}, "feature 'fa' is read by table 'b' and another of those"),
        ({"init_fn": torch.nn.init.zeros_}, "table 'b' has an init_fn of its own"),
    ],
)
def test_tables_that_cannot_be_one(change, message):
    shape = dict(num_embeddings=50, embedding_dim=16)
    first = EmbeddingBagConfig(name="a", feature_names=["fa"], **shape)
    second = EmbeddingBagConfig(**{"name": "b", "feature_names": ["fb"], **shape, **change})
    with pytest.raises(ValueError, match=message):
        joint_table([first, second], "one")


def test_fields_of_a_joint_table():
    shape = dict(embedding_dim=16, weight_init_min=-0.1, weight_init_max=0.3)
    a = EmbeddingBagConfig(name="a", num_embeddings=30, **shape)
    b = EmbeddingBagConfig(name="b", num_embeddings=90, feature_names=["x", "y"], embedding_dim=16)
    fields = joint_table([a, b], "one")
    assert fields["id_ranges"] == {"a": range(30), "x": range(30, 120), "y": range(30, 120)}
    assert fields["weight_init_max"] == pytest.approx((0.3 * 30 + 90**-0.5 * 90) / 120)
    made = CCEEmbeddingBagConfig.from_bytes(2000, **fields)
    assert made.name == "one" and made.num_embeddings == 120
    with pytest.raises(ValueError, match="table 'a' is compressed already"):
        joint_table([CCEEmbeddingBagConfig(num_rows=2, **vars_of(a)), b])
    with pytest.raises(ValueError, match="1 tables to join; give two or more"):
        joint_table([b])


def vars_of(config):
    return {key: value for key, value in vars(config).items() if key != "init_fn"}
