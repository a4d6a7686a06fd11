"""K-means and the clustering step against plain loops, and their failure modes."""

import copy

import pytest
import torch
import torchrec
from torchrec import KeyedJaggedTensor
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import ClusteringSchedule, cluster
from cce_torchrec.clustering.budget import ChunkShape, budget
from cce_torchrec.clustering.id_passes import ChunkIds, starting_pairs
from cce_torchrec.codes.hashing import helper_hash
from cce_torchrec.codes.storage import seen_ids
from cce_torchrec.kmeans import native
from cce_torchrec.packing import CodePacking
from tests.support.optional import needs


def module(**kwargs):
    torch.manual_seed(0)
    config = CCEEmbeddingBagConfig(
        **{
            **dict(name="t", num_embeddings=400, embedding_dim=16, feature_names=["f"], num_rows=8),
            **kwargs,
        }
    )
    return CCEEmbeddingBagCollection(tables=[config])


def embeddings(m):
    n = m.embedding_bag_configs()[0].num_embeddings
    kjt = KeyedJaggedTensor(
        keys=["f"], values=torch.arange(n), lengths=torch.ones(n, dtype=torch.long)
    )
    return m(kjt).values().detach()


def test_step_follows_the_definition():
    m = module()
    before = embeddings(m)
    report = cluster(m)
    codes = m.codes["t"]
    assert codes.num_clusterings == 1 and len(report.chunks) == 4
    for j, chunk in enumerate(report.chunks):
        weight = m.embedding_bag_collection.embedding_bags[f"t#{j}"].weight.detach()
        main, helper = weight[:8], weight[8:]
        old = before[:, 4 * j : 4 * j + 4]
        rows = codes.unpacked[:, j]
        # Codes are nearest centroids of the old embeddings.
        distances = torch.cdist(old.double(), main.double()).square()
        best = distances.min(1).values
        torch.testing.assert_close(distances[range(400), rows], best, rtol=1e-4, atol=1e-9)
        assert chunk.objective_after == pytest.approx(float(best.sum()), rel=1e-4)
        # Helper rows are mean residuals under the new hash.
        hashed = helper_hash(0, "t", j, 1)(torch.arange(400), 24)
        for row in range(24):
            members = hashed == row
            expected = (old - main[rows])[members].mean(0) if members.any() else torch.zeros(4)
            torch.testing.assert_close(helper[row], expected, rtol=1e-4, atol=1e-6)


def test_optimizer_state_helper_a_tenth_of_its_mean_and_main_averaged():
    m = module()
    parameters = list(m.parameters())
    apply_optimizer_in_backward(torchrec.optim.RowWiseAdagrad, parameters, {"lr": 0.1})
    kjt = KeyedJaggedTensor(
        keys=["f"], values=torch.arange(400), lengths=torch.ones(400, dtype=torch.long)
    )
    m(kjt).values().square().sum().backward()
    weight = m.embedding_bag_collection.embedding_bags["t#1"].weight
    state = weight._in_backward_optimizers[0].state[weight]["sum"]
    old, old_codes = state.clone().view(-1), m.codes["t"].unpacked[:, 1]
    cluster(m)
    new_codes = m.codes["t"].unpacked[:, 1]
    torch.testing.assert_close(state.view(-1)[8:], (0.1 * old[8:].mean()).expand(24))
    for row in range(8):
        members = new_codes == row
        if members.any():
            torch.testing.assert_close(state.view(-1)[row], old[old_codes[members]].mean())


def test_adam_state_through_a_dense_optimizer():
    m = module()
    optimizer = torch.optim.Adam(m.parameters())
    kjt = KeyedJaggedTensor(
        keys=["f"], values=torch.arange(400), lengths=torch.ones(400, dtype=torch.long)
    )
    m(kjt).values().square().sum().backward()
    optimizer.step()
    weight = m.embedding_bag_collection.embedding_bags["t#0"].weight
    old_second = optimizer.state[weight]["exp_avg_sq"].clone()
    cluster(m, optimizer=optimizer)
    state = optimizer.state[weight]
    assert (state["exp_avg"] == 0).all()
    torch.testing.assert_close(
        state["exp_avg_sq"][8:], old_second[8:].mean(0).expand(24, -1).clone()
    )
    assert state["step"] == 1


@pytest.mark.parametrize("value, told", [(float("inf"), "not finite"), (1e20, r"reach 1e\+20")])
def test_failed_step_leaves_everything_as_it_was(value, told):
    m = module()
    with torch.no_grad():
        m.embedding_bag_collection.embedding_bags["t#2"].weight[3, 1] = value
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match=f"table 't', chunk 2: .*{told}"):
        cluster(m)
    after = m.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_optimizer_state_that_is_not_finite_is_refused():
    """What the step averages; first moments start at zero again, whatever they were."""
    m = module()
    optimizer = torch.optim.Adam(m.parameters(), lr=0.1)
    lookup = KeyedJaggedTensor(["f"], torch.arange(10), lengths=torch.ones(10).int())
    m(lookup).values().sum().backward()
    optimizer.step()
    state = optimizer.state[m.embedding_bag_collection.embedding_bags["t#1"].weight]
    state["exp_avg_sq"][5, 0] = float("inf")
    before = copy.deepcopy(m.state_dict())
    told = "table 't', chunk 1: optimizer state 'exp_avg_sq' is not finite .* restore the last"
    with pytest.raises(ValueError, match=told):
        cluster(m, optimizer=optimizer)
    after = m.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    state["exp_avg_sq"][5, 0], state["exp_avg"][5, 0] = 1.0, float("nan")
    cluster(m, optimizer=optimizer)
    assert (state["exp_avg"] == 0).all()


def test_tables_that_do_not_cluster_are_left_alone():
    for m in (module(num_helper_rows=0), module(num_helper_rows=0, learned_codes=False)):
        before = embeddings(m)
        assert cluster(m).chunks == []
        assert torch.equal(before, embeddings(m))


def test_clustering_needs_less_error_than_hashing():
    """Ids in 8 latent groups: a step recovers what the initial hash mixes up."""
    m = module(num_embeddings=2000, num_rows=8)
    report = cluster(m)
    assert all(c.objective_after < c.objective_before for c in report.chunks)


def grouped(num_ids=20_000, num_rows=64, **kwargs):
    """A table whose ids have traffic enough to make codebooks differ."""
    return module(num_embeddings=num_ids, num_rows=num_rows, **kwargs)


def states_equal(a, b):
    one, other = a.state_dict(), b.state_dict()
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("num_rows", [8, 300, 70_000])
def test_compiled_and_torch_passes_agree(monkeypatch, num_rows):
    """uint8, int16 (above 32,767 too) and int32 codes; 70,000 rows leave more clusters than ids."""
    if not native.available():
        pytest.skip("the compiled kernels were not built")
    num_ids = 500 if num_rows > 2**16 else 40_000
    compiled = module(num_embeddings=num_ids, num_rows=num_rows, num_helper_rows=50)
    plain = copy.deepcopy(compiled)
    for _ in range(2):
        cluster(compiled, backend="torch", iterations=1)
    monkeypatch.setattr(native, "available", lambda: False)
    for _ in range(2):
        cluster(plain, backend="torch", iterations=1)
    assert states_equal(compiled, plain)


def test_pair_table_and_id_list_agree():
    """A memory limit too small for the table over pairs changes the way, not the result."""
    by_pair, by_list = grouped(), grouped()
    config = by_pair.embedding_bag_configs()[0]
    shape = ChunkShape(
        num_ids=config.num_embeddings,
        num_rows=config.num_rows,
        helper_rows=config.helper_rows,
        dim=config.chunk_dim,
    )
    chosen = budget(shape, 1 << 30)
    smaller = budget(shape, chosen.working_bytes - 1)
    assert chosen.by_pair and not smaller.by_pair
    few = ChunkShape(num_ids=40, num_rows=8, helper_rows=8, dim=4)
    every = budget(few, 1 << 30, samples_per_centroid=4)
    assert not every.by_pair and every.samples_per_centroid == 4
    report = cluster(by_pair)
    other = cluster(by_list, samples_per_centroid=10**6)  # all ids, as a list
    assert states_equal(by_pair, by_list)
    assert report.chunks[0].objective_after == other.chunks[0].objective_after
    assert report.peak_bytes >= chosen.working_bytes


def ids_of(codes, num_rows, helper_rows, local):
    """The second column of `codes`, under a hash."""
    return ChunkIds(
        codes=codes,
        packing=CodePacking.of_rows(num_rows),
        column=1,
        num_rows=num_rows,
        helper_rows=helper_rows,
        hash=helper_hash(0, "t", 1, 0),
        local=local,
        num_ids=local.stop,
    )


def test_starts_are_the_pairs_of_hashed_ids():
    """Of the pairs that were listed, those of the drawn ids come first, each once."""
    m = grouped(num_ids=3000)
    codes = m.codes["t"].codes
    ids = ids_of(codes, 64, 192, range(3000))
    sample = helper_hash(7, "t", 1, 3)
    every = ids.keys(torch.arange(3000)).unique()
    some = every[::3]
    for count in (5, 40):  # all ids are sorted by hash from 3000 / 8 on, below they are drawn
        drawn = (sample.bits31(torch.arange(4 * count)) * 3000) >> 31
        wanted = list(dict.fromkeys(k for k in ids.keys(drawn).tolist() if k in set(some.tolist())))
        starts = starting_pairs(ids.keys(ids.drawn(sample, count)), count, some)
        assert len(starts) == count == len(set(starts.tolist()))
        got = some[starts].tolist()
        common = min(count, len(wanted))
        assert got[:common] == wanted[:common]
    drawn = ids.keys(ids.drawn(sample, 10_000))
    assert len(starting_pairs(drawn, 10_000, some)) == len(some)


def test_a_sample_is_nearly_as_good_as_all_ids():
    everyone, some = grouped(), grouped()
    all_ids = cluster(everyone).chunks[0]
    sampled = cluster(some, samples_per_centroid=50).chunks[0]
    codes = some.codes["t"].unpacked[:, 0]
    before = embeddings(grouped())[:, :4].double()
    main = some.embedding_bag_collection.embedding_bags["t#0"].weight[:64].detach().double()
    reached = float((before - main[codes]).square().sum())
    assert reached < 1.06 * all_ids.objective_after  # 50 per centroid: 3.4 % in kmeans-notes
    assert sampled.ids == all_ids.ids


def test_weights_decide_where_centroids_go():
    """With 90 % of ids weighted 0, the others are represented better than by uniform K-means."""
    seen = torch.zeros(20_000, dtype=torch.int64)
    seen[::10] = 1
    before = embeddings(grouped())[seen.bool()].double()

    def error_of_seen(weights):
        m = grouped()
        cluster(m, weights=weights)
        rows = m.codes["t"].unpacked[seen.bool()]
        main = [m.embedding_bag_collection.embedding_bags[f"t#{j}"].weight[:64] for j in range(4)]
        reached = torch.cat([main[j][rows[:, j]] for j in range(4)], 1).detach().double()
        return float((before - reached).square().sum())

    assert error_of_seen({"t": seen}) < 0.95 * error_of_seen(None)
    with pytest.raises(ValueError, match=r"table 't': weights must be integers \[20000\]"):
        cluster(grouped(), weights={"t": seen[:5]})
    with pytest.raises(ValueError, match="negative"):
        cluster(grouped(), weights={"t": seen - 1})


@pytest.mark.parametrize("main, helper", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1e-15, 1e12)])
@pytest.mark.parametrize("options", [{}, {"samples_per_centroid": 2}])
def test_degenerate_codebooks(main, helper, options):
    """No helper, no main, all ids equal, scales far apart: finite, and never worse than before."""
    m = module(num_embeddings=500, num_rows=40)
    with torch.no_grad():
        for bag in m.embedding_bag_collection.embedding_bags.values():
            bag.weight[:40] *= main
            bag.weight[40:] *= helper
    before = embeddings(m)
    report = cluster(m, **options)
    after = embeddings(m)
    assert torch.isfinite(after).all()
    assert (after - before).norm() <= 1.001 * (before - before.mean(0)).norm() + 1e-30
    for chunk in report.chunks:
        assert chunk.objective_after <= 1.001 * chunk.objective_before or helper == 0.0
    if main == helper == 0.0:
        assert not after.any()


def lookup(m, ids):
    lengths = torch.ones(len(ids), dtype=torch.long)
    return m(KeyedJaggedTensor(keys=["f"], values=ids, lengths=lengths))


def test_seen_ids_are_those_of_training_lookups():
    m = grouped(track_seen=True)
    plain = grouped()
    ids = torch.randint(0, 2000, (5000,), generator=torch.Generator().manual_seed(0))
    lookup(m, ids)
    lookup(m.eval(), torch.arange(10_000, 20_000))  # evaluation leaves no trace
    expected = torch.zeros(20_000, dtype=torch.uint8)
    expected[ids] = 1
    assert torch.equal(seen_ids(m.codes["t"].seen, 20_000), expected)
    assert m.embedding_bag_configs()[0].table_bytes == 2502 + (
        plain.embedding_bag_configs()[0].table_bytes
    )
    cluster(m, weights="seen")
    cluster(plain, weights={"t": expected.long()})
    assert torch.equal(m.codes["t"].codes, plain.codes["t"].codes)
    assert not m.codes["t"].seen.any()
    cluster(m, weights="seen")  # nothing was seen: uniform
    with pytest.raises(ValueError, match=r"weights='seen' needs a table with track_seen=True"):
        cluster(plain, weights="seen")


@pytest.mark.parametrize("options", [{}, {"samples_per_centroid": 2}])
def test_where_nothing_was_seen_each_id_counts(options):
    """As without weights, and not each pair of codes however many ids share it."""
    seen, plain = (grouped(num_rows=2, num_helper_rows=3, track_seen=True) for _ in range(2))
    weighted, without = cluster(seen, weights="seen", **options), cluster(plain, **options)
    assert [c.objective_after for c in weighted.chunks] == [
        c.objective_after for c in without.chunks
    ]
    for name, value in plain.state_dict().items():
        assert torch.equal(seen.state_dict()[name], value), name


def test_seen_weights_keep_what_training_has_learned():
    """90% of ids are never seen: the loss after a step, helper rows included, is lower."""

    def loss_after_clustering(weights):
        m = module(num_embeddings=4000, num_rows=100, track_seen=True)
        optimizer = torch.optim.Adam(m.parameters(), lr=0.02)
        g = torch.Generator().manual_seed(1)
        ids = torch.randperm(4000, generator=g)[:400]
        target = torch.randn(12, 16, generator=g)[torch.randint(0, 12, (400,), generator=g)]

        def loss():
            return (lookup(m, ids).values() - target).square().mean()

        for step in range(120):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            if step in (39, 79):
                cluster(m, weights=weights, optimizer=optimizer)
        cluster(m, weights=weights, optimizer=optimizer)
        return float(loss())

    seen, uniform = map(loss_after_clustering, ("seen", None))
    assert seen < 0.95 * uniform


def test_metric_spends_precision_where_it_counts():
    """A metric that only sees column 0 of each chunk: column 0 is represented better."""
    only_first = torch.zeros(4, 4, 4)
    only_first[:, 0, 0] = 1
    before = embeddings(grouped())[:, ::4].double()

    def error_of_first(**options):
        m = grouped()
        cluster(m, **options)
        rows = m.codes["t"].unpacked
        main = [m.embedding_bag_collection.embedding_bags[f"t#{j}"].weight[:64] for j in range(4)]
        reached = torch.stack([main[j][rows[:, j], 0] for j in range(4)], 1).detach().double()
        return float((before - reached).square().sum())

    by_list = {"samples_per_centroid": 300}  # of 312 ids a centroid: scored again at the end
    assert error_of_first(metric={"t": only_first}) < 0.1 * error_of_first()
    assert error_of_first(metric={"t": only_first}, **by_list) < 0.1 * error_of_first()
    with pytest.raises(ValueError, match=r"table 't': metric must be \[num_chunks, 4, 4\]"):
        cluster(grouped(), metric={"t": torch.eye(4)})


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("faiss", marks=needs("faiss")),
        pytest.param("sklearn", marks=needs("sklearn")),
        pytest.param("sklearn-minibatch", marks=needs("sklearn")),
        "torch",
    ],
)
@pytest.mark.parametrize("init", ["random", "k-means++", "main"])
def test_backends_and_starts(backend, init):
    reference = cluster(grouped(), backend="torch", init=init).chunks[0]
    m = grouped()
    got = cluster(m, backend=backend, init=init).chunks[0]
    margin = 1.05 if backend == "sklearn-minibatch" else 1.005  # mini batches: 2 % in the notes
    assert got.objective_after <= margin * reference.objective_after
    assert m.codes["t"].num_clusterings == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backend": "spark"}, "unknown K-means backend 'spark'"),
        ({"init": "zeros"}, "unknown init 'zeros'"),
        ({"iterations": 0}, "iterations 0"),
        ({"samples_per_centroid": 0}, "samples_per_centroid 0"),
        ({"weights": "recent"}, "unknown weights 'recent'"),
        ({"memory_limit": 10}, "memory_limit is 10"),
        ({"memory_limit": 0}, "memory_limit 0 is below 1 byte"),
        ({"weights": {"typo": torch.ones(400).long()}}, r"weights for \['typo'\]"),
        ({"metric": {"typo": torch.eye(4)[None]}}, r"metric for \['typo'\]"),
    ],
)
def test_bad_options_change_nothing(options, message):
    m = module()
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match=message):
        cluster(m, **options)
    assert all(torch.equal(before[key], value) for key, value in m.state_dict().items())


def test_schedules():
    evenly = ClusteringSchedule.evenly(1000, 18)
    assert len(evenly.steps) == 18 and max(evenly.steps) == 900 and evenly.due(50)
    assert not any(ClusteringSchedule.never().due(step) for step in range(1, 100))
    assert [s for s in range(1, 31) if ClusteringSchedule.every(10).due(s)] == [10, 20, 30]
    assert sorted(ClusteringSchedule.at_epochs([1, 3], 5).steps) == [5, 15]
    assert ClusteringSchedule.evenly(3, 18).steps == {1, 2, 3}
    for bad in (
        lambda: ClusteringSchedule.every(0),
        lambda: ClusteringSchedule.evenly(0),
        lambda: ClusteringSchedule.at_epochs([0], 5),
    ):
        with pytest.raises(ValueError, match=r"step|epoch"):
            bad()


def test_a_rank_without_ids_has_no_blocks():
    """Of a small ROW_WISE table; on a GPU a block is all that a rank has."""
    codes = CodePacking.of_rows(4).pack(torch.zeros(0, 2))
    ids = ids_of(codes, 4, 4, range(20, 20))
    assert list(ids.blocks(len(ids.local))) == []
    assert not ids.count_pairs().any()


@pytest.mark.parametrize("start", [0, 1])
def test_assigned_bits_of_seen_ids_are_in_whole_words(start):
    """The kernel that marks ids reads and writes words."""
    config = CCEEmbeddingBagConfig(
        name="t", num_embeddings=1000, embedding_dim=16, feature_names=["f"], num_rows=40,
        track_seen=True,
    )  # fmt: skip
    module = CCEEmbeddingBagCollection([config])
    state = module.state_dict()
    key = next(key for key in state if key.endswith("seen"))
    room = torch.randint(256, (start + len(state[key]),), dtype=torch.uint8)
    state[key] = room[start:]
    module.load_state_dict(state, assign=True)
    seen = module.codes["t"].seen
    assert torch.equal(seen, room[start:])
    words = -(-len(seen) // 4)
    assert seen.data_ptr() % 4 == 0
    assert seen.untyped_storage().nbytes() - seen.storage_offset() >= 4 * words
