"""Features with ids of their own in one table: as if their ids had been counted on by hand."""

import logging

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec import KeyedJaggedTensor
from torchrec.fx import symbolic_trace

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    cluster,
    finalize,
)
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.codes.counts import levels_of
from cce_torchrec.codes.hashing import hash_ids, raw_id_key
from cce_torchrec.codes.storage import seen_ids
from tests.support.models import KEYS, MEAN, STRIDE, SUM, batch, tables, vbe_batch

RANGES = {"f": range(100, 140), "g": range(0, 40), "h": range(45, 85), "unused": range(100, 140)}
"""Two features share their ids, and some ids are nobody's."""


def table(**settings):
    shape = dict(name="t", num_embeddings=150, embedding_dim=16, num_rows=5)
    return CCEEmbeddingBagConfig(
        **{**shape, "feature_names": ["g", "h", "f", "unused"], **settings}
    )


def twins(**settings):
    """A collection with ranges, and one of the same values that reads the table's own ids."""
    modes = {
        key: settings.pop(key) for key in ("is_weighted", "bounds_check_mode") if key in settings
    }
    made = [
        CCEEmbeddingBagCollection([table(id_ranges=ranges, **settings)], **modes)
        for ranges in (RANGES, None)
    ]
    made[1].load_state_dict(made[0].state_dict())
    return made


def counted_on(kjt, ranges=RANGES):
    """`kjt` with ids as the table counts them."""
    values = [jt.values() + ranges[key].start for key, jt in kjt.to_dict().items()]
    return KeyedJaggedTensor(
        keys=kjt.keys(),
        values=torch.cat(values),
        lengths=kjt.lengths(),
        weights=kjt.weights_or_none(),
        stride=None if kjt.variable_stride_per_key() else kjt.stride(),
        stride_per_key_per_rank=kjt.stride_per_key_per_rank()
        if kjt.variable_stride_per_key()
        else None,
        inverse_indices=kjt.inverse_indices_or_none(),
    )


def of_type(kjt, dtype):
    return KeyedJaggedTensor(
        kjt.keys(), kjt.values().to(dtype), lengths=kjt.lengths(), stride=STRIDE
    )


def same(pair, kjt):
    """Equal outputs and gradients of both."""
    ours, plain = pair
    before = kjt.values().clone()
    expected, got = plain(counted_on(kjt)), ours(kjt)
    assert torch.equal(kjt.values(), before) and got.keys() == expected.keys()
    torch.testing.assert_close(got.values(), expected.values(), rtol=0, atol=0)
    for module, out in ((ours, got), (plain, expected)):
        module.zero_grad()
        out.values().square().sum().backward()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


@pytest.mark.parametrize("make", [batch, vbe_batch])
@pytest.mark.parametrize("pooling", [SUM, MEAN])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_ids_count_from_the_first_of_their_range(is_weighted, pooling, make):
    pair = twins(pooling=pooling, is_weighted=is_weighted)
    for step in (None, cluster, finalize):
        if step:
            for one in pair:
                step(one)
        same(pair, make(3, is_weighted))


@pytest.mark.parametrize(
    "settings",
    [
        {"learned_codes": False},
        {"num_helper_rows": 0},
        {"num_rows": 1},
        {"num_chunks": 1},
        {"track_seen": True},
        {"recipe": "rare", "num_rows": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_tables_of_every_kind(settings, dtype):
    pair = twins(**settings)
    same(pair, of_type(batch(0, False), dtype))
    for (name, one), other in zip(pair[0].named_buffers(), pair[1].buffers(), strict=True):
        assert torch.equal(one, other), name


def test_without_the_compiled_expansion(monkeypatch):
    pair = twins()
    monkeypatch.setattr("cce_torchrec.lookup.native.available", lambda: False)
    same(pair, batch(1, False))


def test_a_batch_without_ids():
    ours, _ = twins()
    none = KeyedJaggedTensor(
        KEYS, torch.empty(0, dtype=torch.int64), lengths=torch.zeros(8, dtype=torch.int64), stride=2
    )
    out = ours(none).values()
    assert out.shape == (2, 64) and not out.any()


def test_only_ids_of_a_range_are_noted():
    ours, _ = twins(track_seen=True, track_counts=True)
    ours(batch(0, False))
    noted = seen_ids(ours.codes["t"].seen, 150).nonzero().view(-1)
    allowed = torch.cat([torch.arange(r.start, r.stop) for r in RANGES.values()]).unique()
    assert len(noted) and torch.isin(noted, allowed).all()
    jagged = batch(0, False).to_dict()
    expected = torch.cat([jagged[name].values() + RANGES[name].start for name in RANGES]).unique()
    assert torch.equal(noted, expected)
    assert torch.equal(
        levels_of(ours.codes["t"].counts, torch.arange(150)).nonzero().view(-1), expected
    )


def one_bag_each(g, h, f, unused):
    bags = dict(g=g, h=h, f=f, unused=unused)
    return KeyedJaggedTensor(
        KEYS,
        torch.tensor([i for key in KEYS for i in bags[key]]),
        lengths=torch.tensor([len(bags[key]) for key in KEYS]),
        stride=1,
    )


BAD = one_bag_each([39, -1], [0], [40, 40, 2**40], [])


@pytest.mark.parametrize("mode", [BoundsCheckMode.WARNING, BoundsCheckMode.IGNORE])
def test_an_id_out_of_its_range_is_read_as_the_first_one(mode, caplog):
    ours, _ = twins(bounds_check_mode=mode)
    with caplog.at_level(logging.WARNING):
        got = ours(BAD).values()
    expected = ours(one_bag_each([39, 0], [0], [0, 0, 0], [])).values()
    assert torch.equal(got, expected)
    tells = mode == BoundsCheckMode.WARNING
    assert ours.num_invalid_ids == (4 if tells else 0)
    told = "table 't', feature 'f': id 40 is outside [0, 40) (3 such ids in this batch)"
    assert (told in caplog.text) == tells


def test_an_id_out_of_its_range_ends_the_job_in_fatal_mode():
    ours, _ = twins(bounds_check_mode=BoundsCheckMode.FATAL)
    with pytest.raises(
        ValueError,
        match=r"feature 'g': id -1 is outside .*; give the feature a longer range in id_ranges",
    ):
        ours(BAD)
    ours(one_bag_each([39], [0], [1], [39]))


def test_unchecked_ids_are_only_counted_on():
    ours, plain = twins(bounds_check_mode=BoundsCheckMode.NONE)
    same((ours, plain), one_bag_each([44], [0], [3], []))


def test_raw_ids_are_hashed_into_their_range():
    ours, _ = twins(hash_ids=True, seed=7)
    raw = {"g": [2**62, -5], "h": [3], "f": [3, 11], "unused": [3]}
    plain = CCEEmbeddingBagCollection([table(seed=7)])
    plain.load_state_dict(ours.state_dict())
    numbers = {
        name: hash_ids(torch.tensor(ids), raw_id_key(7, f"t#{RANGES[name].start}"), 40).tolist()
        for name, ids in raw.items()
    }
    expected = plain(counted_on(one_bag_each(**numbers))).values()
    assert torch.equal(ours(one_bag_each(**raw)).values(), expected)
    assert numbers["unused"][0] == numbers["f"][0] and ours.num_invalid_ids == 0
    # A checkpoint format.
    assert numbers["f"] == [24, 6] and numbers["h"] == [14]


def test_a_graph_has_the_same_ranges():
    for settings in ({}, {"hash_ids": True}):
        ours, _ = twins(**settings)
        cluster(ours)
        kjt = batch(2, False)
        torch.testing.assert_close(symbolic_trace(ours)(kjt).values(), ours(kjt).values())


def test_sequences():
    both = [[table(id_ranges=ranges)] for ranges in (RANGES, None)]
    ours, plain = (CCEEmbeddingCollection(configs, need_indices=True) for configs in both)
    plain.load_state_dict(ours.state_dict())
    kjt = batch(4, False)
    got, expected = ours(kjt), plain(counted_on(kjt))
    for name, one in got.items():
        assert torch.equal(one.values(), expected[name].values())
        assert torch.equal(one.weights(), kjt[name].values())  # the batch's own ids


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([40, 40], r"id_ranges \[40, 40\] is no dictionary of features to ranges; give"),
        ({**RANGES, "f": (0, 40)}, "is no dictionary of features to ranges"),
        (
            {"f": range(5)},
            r"id_ranges are of features \['f'\], and the table is read by \['f', 'g'",
        ),
        ({}, r"id_ranges are of features \[\], and"),
        ({**RANGES, "h": range(0)}, r"feature 'h' are range\(0, 0\); give one id or more"),
        ({**RANGES, "h": range(50, 151)}, r"or more of range\(0, 150\), by num_embeddings"),
        ({**RANGES, "h": range(-1, 10)}, "feature 'h' are range"),
        ({**RANGES, "h": range(50, 60, 2)}, "one after the other"),
        ({**RANGES, "h": range(39, 60)}, r"'g' and 'h' are range\(0, 40\) and range\(39, 60\), wh"),
        (
            {**RANGES, "f": range(100, 141)},
            "'unused' are range.*overlap; give the same ids or others",
        ),
    ],
)
def test_ranges_that_do_not_fit(ranges, message):
    with pytest.raises(ValueError, match=rf"table 't'.*{message}"):
        table(id_ranges=ranges)


def saved(path, **settings):
    torch.manual_seed(1)
    made = CCEEmbeddingBagCollection([table(id_ranges=RANGES, **settings)])
    cluster(made)
    save_checkpoint(path, made, step=1)
    return made


def test_a_checkpoint_keeps_the_ranges(tmp_path):
    ours = saved(tmp_path)
    torch.manual_seed(2)
    again = CCEEmbeddingBagCollection([table(id_ranges=dict(reversed(RANGES.items())))])
    load_checkpoint(tmp_path, again)
    assert torch.equal(again(batch(0, False)).values(), ours(batch(0, False)).values())
    others = {**RANGES, "h": range(50, 85)}
    for ranges in (others, None):
        with pytest.raises(
            ValueError, match=r"id_ranges is \{.*'h': \[45, 85\].* in the checkpoint"
        ):
            load_checkpoint(tmp_path, CCEEmbeddingBagCollection([table(id_ranges=ranges)]))


def test_ranges_grow_at_their_end(tmp_path):
    ours = saved(tmp_path)
    more = {
        **RANGES, "h": range(45, 90), "f": range(100, 170), "unused": range(100, 170),
        "new": range(170, 210),
    }  # fmt: skip
    names = ["g", "h", "f", "unused", "new"]

    def grown(ranges):
        return CCEEmbeddingBagCollection(
            [table(id_ranges=ranges, num_embeddings=210, feature_names=names)]
        )

    larger = grown(more)
    with pytest.raises(
        ValueError, match=r"id_ranges is .* fewer features, are taken by grow=\['t'\]"
    ):
        load_checkpoint(tmp_path, larger)
    load_checkpoint(tmp_path, larger, grow=["t"])
    kjt = batch(0, False, keys=[*KEYS, "new"])
    old = ours(kjt)
    got = larger(kjt)
    for name in RANGES:
        assert torch.equal(got[name], old[name]), name
    assert larger.num_invalid_ids == 0
    moved = {**more, "h": range(46, 90)}
    with pytest.raises(ValueError, match="id_ranges is"):
        load_checkpoint(tmp_path, grown(moved), grow=["t"])


@pytest.mark.parametrize("make", [batch, vbe_batch])
def test_the_output_has_the_order_that_was_asked_for(make):
    order = ["h@u", "g", "f@p", "f@t", "h@p"]
    torch.manual_seed(0)
    usual = CCEEmbeddingBagCollection(tables(MEAN))
    ours = CCEEmbeddingBagCollection(tables(MEAN), output_order=order)
    ours.load_state_dict(usual.state_dict())
    kjt = make(1, False)
    expected, got = usual(kjt), ours(kjt)
    assert got.keys() == order
    assert torch.equal(got.values(), torch.cat([expected[name] for name in order], dim=1))
    graph = symbolic_trace(ours)(kjt)
    assert graph.keys() == order
    torch.testing.assert_close(graph.values(), got.values())
    with pytest.raises(ValueError, match=r"output_order is \['g'\], and the output has \['f@t'"):
        CCEEmbeddingBagCollection(tables(SUM), output_order=["g"])


def test_on_meta():
    made = CCEEmbeddingBagCollection([table(id_ranges=RANGES)], device="meta")
    assert made(batch(0, False).to("meta")).values().shape == (STRIDE, 64)


def test_a_configuration_keeps_its_ranges_to_itself():
    ranges = dict(RANGES)
    made = table(id_ranges=ranges)
    ranges["f"] = range(0)
    assert made.id_ranges == RANGES
    only = CCEEmbeddingBagConfig(
        name="t", num_embeddings=150, embedding_dim=16, num_rows=5, id_ranges={"t": range(5, 9)}
    )
    assert CCEEmbeddingBagCollection([only]).output.names == ["t"]


ROOM = {**RANGES, "h": range(45, 95)}
"""Grown where there was room."""


def loaded(path, ranges, *, names=None, settings=None, **options):
    made = CCEEmbeddingBagCollection(
        [table(id_ranges=ranges, feature_names=names or list(ranges), **(settings or {}))]
    )
    load_checkpoint(path, made, **options)
    return made


@pytest.mark.parametrize("options", [{"grow": ["t"]}, {"strict": False}], ids=str)
def test_room_is_taken_and_features_come_and_go(tmp_path, options):
    ours = saved(tmp_path)
    kjt = batch(0, False)
    expected = ours(kjt)
    fewer = {name: own for name, own in RANGES.items() if name != "f"}
    for ranges in (ROOM, fewer, {**ROOM, "new": range(95, 99)}):
        made = loaded(tmp_path, ranges, **options)
        same = [name for name in KEYS if name in ranges]
        bags = kjt.to_dict()
        none = torch.zeros(STRIDE, dtype=torch.int64)
        own = KeyedJaggedTensor(
            [*same, "new"],
            torch.cat([bags[name].values() for name in same]),
            lengths=torch.cat([*(bags[name].lengths() for name in same), none]),
            stride=STRIDE,
        )
        got = made(own)
        for name in same:
            assert torch.equal(got[name], expected[name]), name


def test_a_finalized_checkpoint_and_longer_ranges(tmp_path):
    torch.manual_seed(1)
    made = CCEEmbeddingBagCollection([table(id_ranges=RANGES)])
    finalize(made)
    save_checkpoint(tmp_path, made, step=1)
    again = loaded(tmp_path, ROOM, grow=["t"])
    assert not again.embedding_bag_configs()[0].helper_rows
    kjt = batch(0, False)
    assert torch.equal(again(kjt)["g"], made(kjt)["g"])


def test_raw_ids_take_new_features_and_no_longer_ranges(tmp_path):
    raw = {"hash_ids": True}
    ours = saved(tmp_path, **raw)
    kjt = batch(0, False, keys=[*KEYS, "new"])
    made = loaded(tmp_path, {**RANGES, "new": range(90, 99)}, settings=raw, grow=["t"])
    assert torch.equal(made(kjt)["f"], ours(kjt)["f"])
    with pytest.raises(ValueError, match="with hash_ids a larger table renumbers all raw ids"):
        loaded(tmp_path, ROOM, settings=raw, grow=["t"])
