"""The recipe for rare ids: what is frozen, what is counted, and how vectors are shrunk."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torchrec
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    ClusteringSchedule,
    TrainingProgress,
    checkpoint_info,
    cluster,
    finalize,
)
from cce_torchrec.checkpoint import load_checkpoint, save_checkpoint
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.replicas import check_equal, digests
from cce_torchrec.codes import counts
from cce_torchrec.codes.hashing import bits_of_batch
from cce_torchrec.config import all_rare
from cce_torchrec.kmeans import native
from cce_torchrec.lookup import native as lookup_native
from cce_torchrec.lookup.noting import note

N = 1001


def config(**kwargs):
    defaults = dict(
        name="t", num_embeddings=N, embedding_dim=8, feature_names=["f"], num_rows=4,
        num_helper_rows=60, num_chunks=2, recipe="rare", weight_init_min=-1.0, weight_init_max=1.0,
    )  # fmt: skip
    return CCEEmbeddingBagConfig(**{**defaults, **kwargs})


def collection(*configs):
    torch.manual_seed(0)
    return CCEEmbeddingBagCollection(list(configs) or [config()])


def batch(ids):
    return KeyedJaggedTensor(["f"], ids, lengths=torch.ones(len(ids), dtype=torch.int32))


def weights(module, chunk):
    return module.embedding_bag_collection.embedding_bags[f"t#{chunk}"].weight


def main_of(module):
    return [weights(module, chunk)[:4].detach().clone() for chunk in range(2)]


def test_recipes_choose_the_tables_of_a_clustering():
    """As the tables alone would be; the others keep their codes, rows and hashes."""
    both = [config(), config(name="u", recipe="frequent", track_counts=True)]
    model = collection(*both)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(cluster(model, recipes=["frequent"]).left_alone) == {"t"}
    named = collection(*both)
    cluster(named, tables=["u"])
    found = model.state_dict()
    for name, value in named.state_dict().items():
        assert torch.equal(found[name], value), name
    moved = {name for name, value in before.items() if not torch.equal(found[name], value)}
    assert moved and all(".u#" in name or ".u." in name for name in moved)
    report = cluster(model, recipes=["rare"])
    assert report.left_alone == {"u": "its recipe 'frequent' is not among recipes"}
    assert {chunk.table for chunk in report.chunks} == {"t"}
    assert not cluster(model, tables=["u"], recipes=["rare"]).chunks
    assert len(cluster(model, recipes=["rare", "frequent"]).chunks) == 4
    for bad, told in (
        ("rare", r"recipes='rare' is one recipe; give a list, \['rare'\]"),
        ([], r"recipes \[\] have to be some of \['frequent', 'rare'\]"),
        (5, "recipes=5 is no list or set"),
        (iter(["rare"]), "is no list or set"),
        (["auto"], r"recipes \['auto'\] have to be some of"),
    ):
        with pytest.raises(ValueError, match=told):
            cluster(model, recipes=bad)


def test_options_by_table_are_for_clusterings_of_either_recipe():
    """A schedule gives all its clusterings the same."""
    both = [config(), config(name="u", recipe="frequent")]
    options = {"weights": {name: torch.arange(N) % 3 for name in ("t", "u")}}
    options["metric"] = {name: torch.eye(4).expand(2, 4, 4) for name in ("t", "u")}
    schedule = ClusteringSchedule(frozenset({1}), final=3, rare=frozenset({2}))
    model = collection(*both)
    done = [schedule.cluster_if_due(model, step, **options) for step in (1, 2, 3)]
    tables = [{chunk.table for chunk in report.chunks} for report in done]
    assert tables == [{"u"}, {"t"}, {"u"}]
    for call in (lambda: cluster(model, **options), lambda: cluster(model, weights={"x": None})):
        with pytest.raises(ValueError, match=r"weights for \['[ux]'\], which do not cluster"):
            call()  # u is final, and x no table


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "rowwise": (torchrec.optim.RowWiseAdagrad, {"lr": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.1}),
    "decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.5}),
}


@pytest.mark.parametrize("in_backward", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_trains_main(name, in_backward):
    """Zero before the first clustering, centroids after it; lookups and state dicts have these."""
    module, (cls, settings), optimizer = collection(), OPTIMIZERS[name], None
    if in_backward:
        apply_optimizer_in_backward(cls, list(module.parameters()), settings)
    else:
        optimizer = cls(module.parameters(), **settings)

    def train(steps):
        for step in range(steps):
            module(batch(torch.arange(step, N, 7))).values().sum().backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

    start = weights(module, 0).detach().clone()
    train(3)
    state = module.state_dict()
    for chunk in range(2):
        kept = state[f"embedding_bag_collection.embedding_bags.t#{chunk}.weight"]
        assert not kept[:4].any()
    assert not torch.equal(weights(module, 0)[4:], start[4:])
    out = module(batch(torch.arange(N))).values().detach()
    helper = module.codes["t"].helper_rows(torch.arange(N))
    for chunk in range(2):
        rows = weights(module, chunk).detach()[4 + helper[chunk]]
        assert torch.equal(out[:, 4 * chunk : 4 * chunk + 4], rows)
    cluster(module, optimizer=optimizer)
    centroids = main_of(module)
    assert any(rows.any() for rows in centroids)
    train(3)
    module.state_dict()
    for rows, now in zip(centroids, main_of(module), strict=True):
        assert torch.equal(rows, now)


def test_main_is_what_was_loaded():
    module, other = collection(), collection()
    apply_optimizer_in_backward(torch.optim.SGD, list(module.parameters()), {"lr": 0.1})
    for _ in range(2):
        module(batch(torch.arange(N))).values().sum().backward()
    cluster(other)
    module.load_state_dict(other.state_dict())
    wanted = main_of(other)
    module(batch(torch.arange(N))).values().sum().backward()
    module(batch(torch.arange(N)))
    for rows, now in zip(wanted, main_of(module), strict=True):
        assert torch.equal(rows, now)


def test_counts_are_about_right():
    """Of ids that are in 1, 10, 100 or all batches; twice in a batch counts once."""
    module = collection(config(num_embeddings=4000))
    for step in range(400):
        every = [400, 100, 10, 1]
        ids = [torch.arange(1000 * i, 1000 * i + 1000) for i, n in enumerate(every) if step < n]
        module(batch(torch.cat([*ids, *ids])))
    levels = counts.levels_of(module.codes["t"].counts, torch.arange(4000))
    found = counts.level_counts()[levels].view(4, 1000).mean(1)
    assert found[3] == 1.0  # the first batch always counts
    torch.testing.assert_close(
        found[:3], torch.tensor([400.0, 100.0, 10.0]).double(), rtol=0.1, atol=0
    )
    module.eval()
    before = module.codes["t"].counts.clone()
    module(batch(torch.arange(4000)))
    assert torch.equal(module.codes["t"].counts, before)


def test_counts_do_not_depend_on_the_order_of_ids():
    one, other = collection(), collection()
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(N, (300,), generator=g)
        one(batch(ids))
        other(batch(ids.flip(0).repeat(2)))
    assert torch.equal(one.codes["t"].counts, other.codes["t"].counts)
    assert one.codes["t"].counts.any()


def test_bits_of_a_batch_are_a_format():
    """They decide what is counted, so that a resumed job has to draw the same ones."""
    found = bits_of_batch(torch.tensor([0, 1, 10**9]), 7, "user", torch.tensor(3))
    assert found.tolist() == [196477802, 237635833, 238981660]


def test_levels_stand_for_numbers_and_copies_add_up():
    stands_for = counts.level_counts()
    assert stands_for[:3].tolist() == [0.0, 1.0, 2.5]
    shares = counts.shrinkage()
    assert shares[0] == 0 and shares[1] == pytest.approx(1 / 21)
    assert bool((shares.diff() > 0).all())
    # Levels 3 and 0 of two ids, twice; and what both had before counts once.
    one, other = (torch.tensor([value], dtype=torch.uint8) for value in (0x03, 0x33))
    low = int(torch.bucketize(stands_for[3], (stands_for[1:] + stands_for[:-1]) / 2))
    assert counts.together([one, other]).tolist() == [0x30 | low]
    assert counts.together([other, other]).tolist() == [0x33]


def reference(module, shares):
    """Embeddings of all ids, shrunk towards the mean row."""
    own = module.codes["t"]
    main, helper = own.main_rows(torch.arange(N)), own.helper_rows(torch.arange(N))
    out = []
    for chunk in range(2):
        rows = weights(module, chunk).detach().double()
        x = rows[main[chunk]] + rows[4 + helper[chunk]]
        mean = rows[:4].mean(0) + rows[4:].mean(0)
        out.append(shares[:, None] * x + (1 - shares[:, None]) * mean)
    return out


@pytest.mark.parametrize("examples", [3, 900], ids=["rare", "frequent"])
@pytest.mark.parametrize("options", [{}, {"samples_per_centroid": 20}], ids=["all", "sampled"])
@pytest.mark.parametrize("compiled", [True, False])
def test_clustering_follows_the_definition(monkeypatch, compiled, options, examples):
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    module = collection(config(recipe="auto", examples_per_id=examples))
    apply_optimizer_in_backward(torch.optim.SGD, list(module.parameters()), {"lr": 0.01})
    g = torch.Generator().manual_seed(0)
    for step in range(60):
        if step == 30:
            cluster(module)
        ids = (torch.rand(200, generator=g) ** 3 * N).long()
        module(batch(ids)).values().square().sum().backward()
    own = module.codes["t"]
    module.restore_main()
    levels = counts.levels_of(own.counts, torch.arange(N))
    assert len(levels.unique()) > 4
    points = reference(module, counts.shrinkage()[levels])
    report = cluster(module, **options)
    rows, helper = own.unpacked, own.helper_rows(torch.arange(N))
    for chunk, x in enumerate(points):
        weight = weights(module, chunk).detach().double()
        distances = torch.cdist(x, weight[:4]).square()
        best = distances.min(1).values
        torch.testing.assert_close(distances[range(N), rows[:, chunk]], best, rtol=1e-3, atol=1e-7)
        if not options:
            assert report.chunks[chunk].objective_after == pytest.approx(
                float(best.sum()), rel=1e-3
            )
        residuals = x - weight[rows[:, chunk]]
        for row in helper[chunk].unique()[:9]:
            mean = residuals[helper[chunk] == row].mean(0)
            torch.testing.assert_close(weight[4 + row], mean, rtol=1e-4, atol=1e-6)


def test_without_counts_nothing_is_shrunk():
    module = collection(config(track_counts=False))
    assert module.codes["t"].counts is None
    points = reference(module, torch.ones(N).double())
    cluster(module)
    rows = module.codes["t"].unpacked
    for chunk, x in enumerate(points):
        distances = torch.cdist(x, weights(module, chunk).detach()[:4].double())
        assert torch.equal(distances.argmin(1), rows[:, chunk])


@pytest.mark.parametrize("examples", [3, 900], ids=["rare", "frequent"])
def test_nothing_is_shrunk_before_the_first_batch(examples):
    """Counts of 0 say nothing then; shrunk by them, all ids would be one point."""
    module = collection(config(recipe="auto", examples_per_id=examples))
    module.restore_main()
    points = reference(module, torch.ones(N).double())
    cluster(module)
    rows = module.codes["t"].unpacked
    assert len(rows.unique()) == 4
    for chunk, x in enumerate(points):
        distances = torch.cdist(x, weights(module, chunk).detach()[:4].double())
        assert torch.equal(distances.argmin(1), rows[:, chunk])


def test_copies_that_would_shrink_differently_are_told_apart():
    """One that has seen a batch, and one that has not: their codes would differ."""
    config_ = config()
    codes = SimpleNamespace(config=config_, num_clusterings=0)
    found = [
        digests(
            [("m", SimpleNamespace(replicas=1, weight=torch.ones(2, 4), optimizer_state={},
                                   codes=codes, chunk=0, levels=levels))],
            Options(),
        )
        for levels in (1, counts.LEVELS)
    ]  # fmt: skip
    check_equal([found[0], found[0]])
    with pytest.raises(ValueError, match="the copy on rank 1 differs"):
        check_equal(found)


def test_a_counted_table_of_frequent_ids_is_finalized(tmp_path):
    module = collection(config(recipe="auto", examples_per_id=900))
    module(batch(torch.arange(0, N, 2)))
    points = reference(
        module, counts.shrinkage()[counts.levels_of(module.codes["t"].counts, torch.arange(N))]
    )
    finalize(module)
    rows = module.codes["t"].unpacked
    for chunk, x in enumerate(points):
        distances = torch.cdist(x, weights(module, chunk).detach().double())
        best = distances.min(1).values
        torch.testing.assert_close(distances[range(N), rows[:, chunk]], best, rtol=1e-4, atol=1e-7)
    noted = module.codes["t"].counts.clone()
    module(batch(torch.arange(0, N, 3)))
    assert torch.equal(module.codes["t"].counts, noted)  # nothing will be clustered by them
    save_checkpoint(tmp_path, module, step=1)
    (finalized,) = module.embedding_bag_configs()
    auto = dict(recipe="auto", examples_per_id=900)
    by_hand = config(num_rows=64, num_helper_rows=0, **auto)
    for made in (finalized, by_hand, config(**auto)):
        other = collection(made)
        load_checkpoint(tmp_path, other)
        assert all(
            torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True)
        )
        assert torch.equal(other.codes["t"].unpacked, module.codes["t"].unpacked)


@pytest.mark.parametrize("first", [0, 8])
def test_compiled_counts_are_those_in_torch(monkeypatch, first):
    """Also of ids that a batch has more than once, and of those that share a byte."""
    if not lookup_native.available():
        pytest.skip("the compiled kernels are not built")
    found, calls, kernel = [], [], lookup_native.count_ids
    monkeypatch.setattr(lookup_native, "count_ids", lambda *a: calls.append(a) or kernel(*a))
    for compiled in (True, False):
        monkeypatch.setattr(lookup_native, "available", lambda on=compiled: on)
        own = collection(config(num_embeddings=500)).codes["t"]
        own = own.select(own.table, own.chunks, torch.device("cpu"), range(first, 500))
        g = torch.Generator().manual_seed(0)
        for _ in range(50):
            own.begin_batch()
            note(own, (torch.rand(300, generator=g) ** 4 * (500 - first)).long())
        found.append(own.counts)
    assert torch.equal(*found) and len(found[0].unique()) > 20 and len(calls) == 50


def test_ids_that_nobody_checks_are_counted_as_id_0():
    """As they are looked up: without checks nothing else may be written."""
    module = CCEEmbeddingBagCollection([config()], bounds_check_mode=BoundsCheckMode.NONE)
    codes = module.codes["t"]
    for ids in ([5, -1], [5, N], [5, 10**11], [5, -(2**62)]):
        codes.reset_parameters()
        module(batch(torch.tensor(ids)))
        assert counts.levels_of(codes.counts, torch.arange(N)).nonzero().view(-1).tolist() == [0, 5]


def test_ids_are_counted_whatever_device_a_job_has_set():
    module, ids = collection(), batch(torch.tensor([3]))
    torch.set_default_device("meta")
    try:
        module(ids)
    finally:
        torch.set_default_device(None)
    assert counts.levels_of(module.codes["t"].counts, torch.tensor([3])).item() == 1


def test_a_table_of_rare_ids_is_not_finalized():
    module = collection(config(), config(name="u", feature_names=["f"], recipe="frequent"))
    report = finalize(module)
    assert "its recipe is 'rare': codes of all its rows would have 6 bits" in report.left_alone["t"]
    assert {chunk.table for chunk in report.chunks} == {"u"}
    kept, finalized = module.embedding_bag_configs()
    assert (kept.num_rows, kept.helper_rows) == (4, 60) and finalized.helper_rows == 0
    with pytest.raises(ValueError, match=r"'t'.*recipe is 'rare'"):
        finalize(module, tables=["t"])


def test_the_recipe_follows_from_the_examples_of_an_id():
    assert config(recipe="auto", examples_per_id=3).recipe == "rare"
    frequent = config(recipe="auto", examples_per_id=1e4)
    assert frequent.recipe == "frequent" and frequent.trains_main and frequent.track_counts
    assert not config(recipe="frequent").track_counts
    assert config(recipe="frequent", track_counts=True).notes == {"counts": 2}


def test_a_model_is_of_rare_ids_if_all_its_cce_tables_are(tmp_path):
    frequent = config(name="u", feature_names=["g"], recipe="frequent")
    plain = EmbeddingBagConfig(name="p", num_embeddings=9, embedding_dim=8, feature_names=["h"])
    for configs in ([], [plain], [frequent], [config(), frequent]):
        assert not all_rare(configs)
    assert all_rare([config(), plain])
    for number, configs in enumerate([[config(), frequent], [config(), plain]]):
        folder = tmp_path / str(number)
        job = TrainingProgress(
            folder, collection(*configs), [], epochs=2, steps_per_epoch=20, save_every=1
        )
        job.advance()
        schedule = checkpoint_info(folder).schedule
        assert schedule.steps == ({10, 20} if number else set(range(4, 33, 4)))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"recipe": "seldom"}, r"table 't': recipe 'seldom' is none of \['frequent', 'rare'"),
        ({"recipe": "auto"}, r"table 't': .* examples_per_id is None; give their mean number"),
        (
            {"recipe": "auto", "examples_per_id": -1},
            "examples_per_id -1 is no finite number of 0 or more",
        ),
        (
            {"recipe": "auto", "examples_per_id": float("nan")},
            "examples_per_id nan is no finite number of 0 or more",
        ),
        ({"learned_codes": False, "track_counts": True}, "learned_codes=False has none"),
    ],
)
def test_bad_recipes(fields, says):
    with pytest.raises(ValueError, match=says):
        config(**fields)


def test_counts_are_saved_and_grow(tmp_path):
    module = collection()
    for step in range(9):
        module(batch(torch.arange(step, N, 3)))
    save_checkpoint(tmp_path, module, step=1)
    same, larger = collection(), collection(config(num_embeddings=1200))
    load_checkpoint(tmp_path, same)
    load_checkpoint(tmp_path, larger, grow=["t"])
    own = module.codes["t"]
    assert torch.equal(same.codes["t"].counts, own.counts) and int(same.codes["t"].batches) == 9
    levels = counts.levels_of(larger.codes["t"].counts, torch.arange(1200))
    assert torch.equal(levels[:N], counts.levels_of(own.counts, torch.arange(N)))
    assert not levels[N:].any()
    with pytest.raises(ValueError, match="track_counts is True in the checkpoint, False in the mo"):
        load_checkpoint(tmp_path, collection(config(track_counts=False)))


def test_a_collection_is_freed_with_its_last_reference():
    """Not when the collector of cycles comes by: its codes may be most of a machine's memory."""
    module = collection()
    module(batch(torch.arange(9)))
    gc.disable()
    try:
        codes = weakref.ref(module.codes["t"])
        del module
        assert codes() is None
    finally:
        gc.enable()
