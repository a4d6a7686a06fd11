"""Features of one table whose embeddings begin with another chunk each."""

import pytest
import torch
from torchrec import KeyedJaggedTensor
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    cluster,
    finalize,
    joint_table,
)
from cce_torchrec.alignment import LiveTable
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.checkpoint.inspection import open_checkpoint
from cce_torchrec.checkpoint.rebuilt import saved_collections
from cce_torchrec.checkpoint.saved_state import SavedState
from cce_torchrec.checkpoint.saved_table import SavedTable
from cce_torchrec.chunk_order import first_chunk, first_chunks, rotated, unrotated
from cce_torchrec.clustering import import_table
from cce_torchrec.inference import inference_collection, plain_collection, vectors_of
from cce_torchrec.inference.collection import lookup_type
from cce_torchrec.planning.table_file import read_tables, tables_yaml

RANGES = {"f": range(100, 140), "g": range(0, 40), "h": range(40, 100), "twin": range(100, 140)}
FIRST = {"f": 2, "g": 0, "h": 1, "twin": 2}
"""By the order of the ids; features that share theirs begin alike."""


def table(**settings):
    shape = dict(name="t", num_embeddings=140, embedding_dim=16, num_rows=5, num_chunks=4)
    shape |= dict(feature_names=[*RANGES], id_ranges=RANGES, rotate_chunks=True)
    return CCEEmbeddingBagConfig(**{**shape, **settings})


def twins(kind=CCEEmbeddingBagCollection, **settings):
    """A clustered collection, and one of the same values whose chunks are in their own order."""
    torch.manual_seed(0)
    rotating, plain = (kind([table(rotate_chunks=on, **settings)]) for on in (True, False))
    cluster(rotating)
    plain.load_state_dict(rotating.state_dict())
    return rotating, plain


def a_batch():
    """Three bags of each feature, one of them empty."""
    lengths = torch.tensor([2, 0, 1] * len(RANGES))
    values = torch.tensor([int(i * 7 % 40) for i in range(int(lengths.sum()))])
    return KeyedJaggedTensor([*RANGES], values, lengths=lengths)


def turned(vectors, feature):
    """By hand: the chunk `FIRST` comes first."""
    parts = vectors.split(4, dim=-1)
    first = FIRST[feature]
    return torch.cat([*parts[first:], *parts[:first]], dim=-1)


def test_numbers_of_ranges():
    starts = [own.start for own in RANGES.values()]
    assert [first_chunk(starts, own.start, 4) for own in RANGES.values()] == [*FIRST.values()]
    assert first_chunk(starts, 100, 2) == 0  # modulo the chunks
    ids = torch.tensor([0, 39, 40, 99, 100, 139])
    assert first_chunks(starts, ids, 4).tolist() == [0, 0, 1, 1, 2, 2]
    vectors = torch.arange(16.0).view(1, 16)
    first = torch.tensor([1])
    assert torch.equal(rotated(vectors, first, 4), vectors.roll(-4, dims=1))
    assert torch.equal(unrotated(rotated(vectors, first, 4), first, 4), vectors)


@pytest.mark.parametrize("settings", [{}, {"hash_ids": True}, {"num_helper_rows": 0}], ids=str)
def test_output_of_bags_and_of_their_graph(settings):
    rotating, plain = twins(**settings)
    kjt = a_batch()
    got, expected = rotating(kjt), plain(kjt)
    for name in RANGES:
        assert torch.equal(got[name], turned(expected[name], name))
    torch.testing.assert_close(symbolic_trace(rotating)(kjt).values(), got.values())


def test_output_of_sequences_and_of_their_graph():
    rotating, plain = twins(CCEEmbeddingCollection)
    kjt = a_batch()
    got, expected, graph = rotating(kjt), plain(kjt), symbolic_trace(rotating)(kjt)
    for name in RANGES:
        assert torch.equal(got[name].values(), turned(expected[name].values(), name))
        torch.testing.assert_close(graph[name].values(), got[name].values())


def test_training_gives_rows_the_gradients_of_their_columns():
    rotating, plain = twins()
    kjt = a_batch()
    outer = torch.randn(3, 16)
    for made, turn in ((rotating, lambda vectors, _: vectors), (plain, turned)):
        out = made(kjt)
        sum((turn(out[name], name) * outer).sum() for name in RANGES).backward()
    for own, other in zip(rotating.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.parametrize("lookup", ["fused", "portable"])
def test_served_alone_and_as_plain_tables(lookup):
    rotating, plain = twins()
    served, others = (
        inference_collection(one, data_type="fp32", lookup=lookup) for one in (rotating, plain)
    )
    ids, bags = torch.arange(40), torch.ones(40, dtype=torch.int64)
    for number, name in enumerate(served.keys):
        expected = turned(vectors_of(others, name, ids), name)
        assert torch.equal(vectors_of(served, name, ids), expected)
        alone = lookup_type(lookup)(served.packed.only(number))
        torch.testing.assert_close(alone(ids, bags), expected)
    full, expected = plain_collection(rotating)(a_batch()), rotating(a_batch())
    for name in RANGES:  # one table of two features: the output has them side by side
        torch.testing.assert_close(full[name], expected[name])


def whole(collection):
    """Vectors of all ids of the table, by lookups of its features."""
    served = inference_collection(collection, data_type="fp32", lookup="portable")
    parts = [vectors_of(served, name, torch.arange(len(RANGES[name]))) for name in ("g", "h", "f")]
    return torch.cat(parts)


def test_a_full_table_is_imported_as_it_is_looked_up():
    weight = torch.randn(140, 16)
    made = CCEEmbeddingBagCollection([table(num_rows=140, num_helper_rows=0)])
    report = import_table(made, "t", weight, samples_per_centroid=None)
    # A row for each id: nothing is lost, if chunks go where lookups read them.
    assert report.error < 1e-9
    torch.testing.assert_close(whole(made), weight)


def test_read_from_a_checkpoint_and_live(tmp_path):
    rotating, _ = twins()
    expected = whole(rotating)
    save_checkpoint(tmp_path, rotating, step=1)
    folder, manifest = open_checkpoint(tmp_path)
    saved = SavedTable(next(iter(manifest.tables)), SavedState(folder, manifest))
    ids = torch.tensor([0, 5, 39, 40, 99, 100, 139])
    torch.testing.assert_close(saved.embeddings(ids).float(), expected[ids])
    live = LiveTable(rotating, rotating.embedding_bag_configs(), "t")
    mixed = torch.tensor([139, 0, 40, 5, 100])
    torch.testing.assert_close(live.embeddings(mixed), expected[mixed])
    sequences = CCEEmbeddingCollection([table()])
    sequences.bags.load_state_dict(rotating.state_dict())
    live = LiveTable(sequences, sequences.embedding_configs(), "t")
    torch.testing.assert_close(live.embeddings(mixed), expected[mixed])
    (found,) = saved_collections(tmp_path)
    assert found.tables[0].rotate_chunks and found.tables[0].id_ranges == RANGES


def test_ids_that_nobody_reads_are_in_no_lookup():
    made = CCEEmbeddingBagCollection([table(num_embeddings=150)])
    with pytest.raises(ValueError, match="table 't': 10 of its ids are read by no feature"):
        LiveTable(made, made.embedding_bag_configs(), "t")


def test_a_checkpoint_keeps_the_order(tmp_path):
    rotating, _ = twins()
    finalize(rotating)
    save_checkpoint(tmp_path, rotating, step=1)
    again = CCEEmbeddingBagCollection([table()])
    load_checkpoint(tmp_path, again)
    assert torch.equal(again(a_batch()).values(), rotating(a_batch()).values())
    other = CCEEmbeddingBagCollection([table(rotate_chunks=False)])
    with pytest.raises(ValueError, match="rotate_chunks is True in the checkpoint, False in the"):
        load_checkpoint(tmp_path, other)


def test_ranges_come_after_those_that_are_there(tmp_path):
    roomy = {"f": range(100, 140), "g": range(0, 30)}
    made = CCEEmbeddingBagCollection([table(id_ranges=roomy, feature_names=[*roomy])])
    save_checkpoint(tmp_path, made, step=1)

    def grown(ranges):
        other = CCEEmbeddingBagCollection([table(id_ranges=ranges, feature_names=[*ranges],
                                                 num_embeddings=200)])  # fmt: skip
        load_checkpoint(tmp_path, other, grow=["t"])
        return other

    kjt = KeyedJaggedTensor([*roomy], torch.tensor([3, 4]), lengths=torch.tensor([1, 1]))
    added = grown({**roomy, "new": range(140, 200)})
    one = torch.tensor([1, 1, 0])
    longer = KeyedJaggedTensor([*roomy, "new"], torch.tensor([3, 4]), lengths=one)
    for name in roomy:
        assert torch.equal(added(longer)[name], made(kjt)[name])
    with pytest.raises(ValueError, match="if ranges keep their number, by which rotate_chunks"):
        grown({**roomy, "new": range(30, 60)})


def test_joint_tables_have_it(tmp_path):
    plain = [
        EmbeddingBagConfig(name=n, num_embeddings=50, embedding_dim=16, feature_names=[n])
        for n in ("u", "v")
    ]
    made = CCEEmbeddingBagConfig(**joint_table(plain), num_rows=3)
    assert made.rotate_chunks and made.finalized().rotate_chunks
    file = tmp_path / "tables.yaml"
    file.write_text(tables_yaml([made]))
    assert read_tables(file)[0].rotate_chunks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotate_chunks": "yes"}, "table 't': rotate_chunks 'yes' is no bool"),
        ({"id_ranges": None}, "and the table has no id_ranges; give some, or leave it out"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        table(**settings)
