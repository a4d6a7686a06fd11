"""Methods of benchmarks.quality: what they compute, restart, and count in bytes."""

import copy
import itertools
from unittest import mock

import pytest
import torch
import torchrec

from benchmarks.quality.budgets import Budget, DoesNotFit
from benchmarks.quality.least_squares import fitted_rows
from benchmarks.quality.methods import METHODS, tensor_train
from benchmarks.quality.methods.clustered import (
    as_published,
    frequent_recipe,
    main_rows_within,
    rare_recipe,
)
from benchmarks.quality.methods.differentiable_pq import DifferentiablePQ
from benchmarks.quality.methods.hash_embeddings import HashEmbeddings
from benchmarks.quality.methods.hashed import HashedRows
from benchmarks.quality.methods.quotient_remainder import QuotientRemainder
from benchmarks.quality.methods.robe import Robe
from benchmarks.quality.methods.tensor_train import TensorTrain, factors, thirds
from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, cluster
from cce_torchrec.data import Rows as DataRows
from cce_torchrec.train.model import keyed_jagged
from tests.support.quality import SIZES, all_ids, tables


def first_try(name, budget="bytes=12000", model="dlrm"):
    tried = METHODS[name].tries(model, 16)[0]
    return METHODS[name].embedder(tables(budget, tried.form, tried.optimizer, tried.rates[0]))


NAMES = [name for name in METHODS if METHODS[name].any_budget]


@pytest.mark.parametrize("model", ["dlrm", "gmf"])
@pytest.mark.parametrize("name", NAMES)
def test_stays_within_its_bytes_and_learns(name, model):
    torch.manual_seed(0)
    embedder = first_try(name, model=model)
    assert embedder.table_bytes <= 12_000
    assert embedder.training_bytes >= 4 * embedder.parameters
    ids = torch.tensor([[0, 300], [1, 499]])
    before = embedder.lookup(ids, training=True)
    assert before.shape == (2, 2, 16)
    embedder.before_evaluation()
    old = embedder.lookup(ids, training=False).clone()
    # Up along a gradient of ones for every value: the sum of the embeddings has to fall.
    for step in range(1, 4):
        embedder.lookup(ids, training=True).sum().backward()
        embedder.step()
        embedder.after(step)
    embedder.before_evaluation()
    assert embedder.lookup(ids, training=False).sum() < old.sum()


@pytest.mark.parametrize("name", NAMES)
def test_every_form_fits_wider_embeddings_before_and_after_a_restart(name):
    torch.manual_seed(0)
    for tried in METHODS[name].tries("gmf", 32):
        wide = tables(form=tried.form, optimizer=tried.optimizer, dim=32)
        embedder = METHODS[name].embedder(wide)
        assert embedder.table_bytes <= 12_000
        for step in (0, 7, 14):
            embedder.after(step)
            assert embedder.lookup(all_ids(), training=True).shape == (200, 2, 32)


def test_ce_in_8_chunks_reads_8_rows():
    made = METHODS["CE"].embedder(tables(form="8 chunks", dim=32))
    assert made.rows.width == 4 and made.index.shape == (500, 8)


def test_one_table_for_all_has_the_ids_of_each_one_after_the_other():
    torch.manual_seed(0)
    made = first_try("CE")
    ((columns, one),) = made.parts
    assert columns == [0, 1]
    ids = torch.tensor([[0, 300], [7, 499]])
    found = made.lookup(ids, training=False)
    for row, example in zip(found, ids, strict=True):
        for embedding, number in zip(row, example, strict=True):
            assert torch.equal(embedding, one.lookup(number.view(1, 1), False)[0, 0])
    rows = 12_000 // 4 // 16
    assert one.counts == [rows] and made.parameters == rows * 16
    bounds = made.tables.bounds
    expected = (300 * bounds[0] + 200 * bounds[1]) / 500
    assert one.tables.bounds == pytest.approx([expected])
    assert one.tables.counts[0].tolist() == [*range(300), *range(200)]


def library_ce(num_chunks, rows):
    """The package's own collection of CE tables, and its optimizer."""
    collection = CCEEmbeddingBagCollection(
        tables=[
            CCEEmbeddingBagConfig(
                name=name,
                num_embeddings=size,
                embedding_dim=16,
                feature_names=[name],
                num_chunks=num_chunks,
                num_rows=count,
                num_helper_rows=0,
                learned_codes=False,
                seed=3,
            )
            for (name, size), count in zip(SIZES.items(), rows, strict=True)
        ]
    )
    return collection, torchrec.optim.RowWiseAdagrad(collection.parameters(), lr=0.1)


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize(
    "budget", ["bytes=12000", "bytes=1500"]
)  # one by one, and all rows at once
def test_trains_as_the_package_does(num_chunks, budget):
    torch.manual_seed(0)
    ours = HashedRows(tables(budget), num_chunks=num_chunks, restarts=False)
    theirs, optimizer = library_ce(num_chunks, ours.counts)
    with torch.no_grad():
        bags = list(theirs.embedding_bags.values())
        for bag, block in zip(bags, ours.rows.blocks_of(ours.rows.weight), strict=True):
            bag.weight.copy_(block)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(200, (8, 2), generator=generator)
        target = torch.randn(8, 2, 16, generator=generator)
        batch = keyed_jagged(DataRows(torch.zeros(8, 1), ids, torch.zeros(8)), list(SIZES))
        expected = theirs(batch).values().view(8, 2, 16)
        found = ours.lookup(ids + torch.tensor([0, 300]), training=True)
        torch.testing.assert_close(found, expected)
        (found * target).sum().backward()
        ours.step()
        optimizer.zero_grad()
        (expected * target).sum().backward()
        optimizer.step()


def test_sparse_and_dense_updates_are_the_same():
    """Rows are updated one by one where they are many, and all at once where they are few."""
    results = []
    for more_rows in (0, 1000):
        torch.manual_seed(0)
        made = HashedRows(tables("bytes=2000"), num_chunks=1, restarts=False)
        rows = made.rows
        rows.weight = torch.cat([rows.weight, torch.zeros(more_rows, 16)])
        rows.state = torch.cat([rows.state, torch.zeros(more_rows, 1)])
        made.lookup(torch.tensor([[0, 300], [7, 301]]), True).square().sum().backward()
        made.step()
        results.append(rows.weight[: sum(made.counts)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_a_restart_takes_means_of_the_ids_that_now_share_a_row(num_chunks):
    torch.manual_seed(0)
    made = HashedRows(tables("bytes=2000"), num_chunks=num_chunks, restarts=True)
    made.rows.state += torch.rand(made.rows.state.shape)
    old_weight, old_index = made.rows.weight.clone(), made.index.clone()
    old_state = made.rows.state.clone()
    assert made.tables.restart_steps == {7, 14}  # of 28 in two passes
    made.after(6)
    assert torch.equal(made.index, old_index)
    made.after(7)
    assert (made.index != old_index).float().mean() > 0.5
    for chunk in range(num_chunks):
        members: dict[int, list[torch.Tensor]] = {}
        for old, new in zip(
            old_index[:, chunk].tolist(), made.index[:, chunk].tolist(), strict=True
        ):
            members.setdefault(new, []).append(old_weight[old])
        for row, values in members.items():
            torch.testing.assert_close(made.rows.weight[row], torch.stack(values).mean(0))
    first = 0
    for block in made.rows.blocks:
        part = slice(first, first + block.rows)
        tenth = 0.1 * old_state[part].mean()
        torch.testing.assert_close(made.rows.state[part], tenth.expand(block.rows, 1))
        first += block.rows


def test_every_restart_draws_a_hash_of_its_own():
    seen = []
    for name in ("hash", "CE", "QR", "hash embeddings", "ROBE", "CAFE"):
        tried = METHODS[f"{name} restarted"].tries("gmf", 16)[0]
        made = METHODS[f"{name} restarted"].embedder(tables("bytes=6000", tried.form, "adagrad"))
        drawn = []
        for step in (0, 7, 14):
            made.after(step)
            drawn.append(getattr(made, "places" if name == "ROBE" else "index").clone())
        seen.append([(a != b).any() for a, b in itertools.combinations(drawn, 2)])
    assert torch.tensor(seen).all()


def test_fitted_rows_are_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(12, (60, 2), generator=generator)
    weights = torch.rand(60, 2, generator=generator) + 0.5
    targets = torch.randn(60, 4, generator=generator)
    matrix = torch.zeros(60, 12)
    for part in range(2):
        matrix[torch.arange(60), index[:, part]] += weights[:, part]
    expected = torch.linalg.lstsq(matrix, targets).solution
    found = fitted_rows(index, weights, targets, 12)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [QuotientRemainder, HashEmbeddings])
def test_a_restart_of_other_lookups_keeps_what_any_hash_can(kind):
    """A constant table is reproduced by any hash, and so has to be by the new one."""
    made = kind(tables(form="weights=0.1"), restarts=True)
    with torch.no_grad():
        made.rows.weight.fill_(1.0)
    old = made.lookup(all_ids(), training=False)
    made.after(7)
    new = made.lookup(all_ids(), training=False)
    torch.testing.assert_close(new, old, atol=1e-3, rtol=1e-3)


def test_robe_reads_blocks_of_one_array_and_restarts_by_means():
    made = Robe(tables(form="Z=4", optimizer="adagrad"), restarts=True)
    arrays = [block.flatten() for block in made.rows.blocks_of(made.rows.weight)]
    for table, first in ((0, 0), (1, 300)):
        array = arrays[table]
        starts = (made.places[first + 7, ::4] - made.rows.first[table]).tolist()
        expected = [array[(s + i) % len(array)] for s in starts for i in range(4)]
        found = made.lookup(torch.tensor([[7, 307]]), training=False)[0, table]
        assert found.tolist() == [float(value) for value in expected]
    with torch.no_grad():
        made.rows.weight.fill_(2.0)
    made.after(7)
    assert torch.equal(made.lookup(all_ids(), training=False), torch.full((200, 2, 16), 2.0))


def test_codes_are_paid_first_and_packed():
    share = Budget.parse("bytes=12000").shares([300], 16)[0]
    rows = main_rows_within(300, share, 16, 4, 1)
    # 5 bits a code: 300 ids * 4 codes * 5 / 8 = 750 bytes, and (17 + 17) rows more than 16 need 5.
    codes = 300 * 4 * 7 // 8  # 7 bits for 65 to 128 rows
    assert codes + 2 * rows * 64 <= 12_000 < codes + 2 * (rows + 1) * 64


@pytest.mark.parametrize("recipe", [as_published, frequent_recipe])
def test_cce_clusters_and_shows_its_new_rows(recipe):
    torch.manual_seed(0)
    made = recipe(tables(form="4 chunks"))
    old = made.index.clone()
    made.rows.state += 1.0
    step = min(made.clusterings)
    made.after(step)
    assert not torch.equal(made.index, old)
    kept = recipe is as_published
    assert bool((made.rows.state == 1.0).all()) == kept
    pooled = made.lookup(torch.tensor([[5, 305]]), training=False)
    batch = keyed_jagged(
        DataRows(torch.zeros(1, 1), torch.tensor([[5, 5]]), torch.zeros(1)), list(SIZES)
    )
    torch.testing.assert_close(made.collection(batch).values().view(1, 2, 16), pooled)


def test_main_rows_of_rare_ids_stay_what_clusterings_make_of_them():
    """Trained by this benchmark as by the package: rows, before and after a clustering."""
    torch.manual_seed(0)
    made = rare_recipe(tables(form="4 chunks, 2 rows", optimizer="rowwise_adagrad"))
    theirs = copy.deepcopy(made.collection)  # weights of its own, before anything is trained
    optimizer = torchrec.optim.RowWiseAdagrad(theirs.parameters(), lr=0.1)
    for step in range(1, 12):
        ids = torch.randint(200, (8, 2), generator=torch.Generator().manual_seed(step))
        batch = keyed_jagged(DataRows(torch.zeros(8, 1), ids, torch.zeros(8)), list(SIZES))
        expected = theirs(batch).values().view(8, 2, 16)
        found = made.lookup(ids + torch.tensor([0, 300]), training=True)
        torch.testing.assert_close(found, expected)
        (found.square() + found).sum().backward()
        made.step()
        made.after(step)
        optimizer.zero_grad()
        (expected.square() + expected).sum().backward()
        optimizer.step()
        if step in made.clusterings:
            cluster(theirs, optimizer=optimizer)
    assert {7} == {step for step in made.clusterings if step < 12}


def test_frequent_ids_of_mgqe_choose_from_more_keys():
    made = DifferentiablePQ(tables("bytes=12000", optimizer="adam"), tail_share=0.25)
    table = made.modules[0]
    # Counts are the ids themselves, so that the last tenth is the most frequent.
    assert table.tail.tolist() == [True] * 270 + [False] * 30
    assert table.tail_keys == table.shape.keys // 4
    # In evaluation an embedding is the values of the keys that fit best, of those it may choose.
    table.eval()
    ids = torch.tensor([299, 5, 299])
    for id_, found in zip(ids.tolist(), table(ids), strict=True):
        count = table.tail_keys if id_ < 270 else table.shape.keys
        fits = torch.einsum(
            "pw,pkw->pk", table.queries[id_].view(table.shape.parts, -1), table.keys[:, :count]
        )
        best = zip(table.values, fits.argmax(1), strict=True)
        torch.testing.assert_close(found, torch.cat([values[at] for values, at in best]))


def test_gradients_of_dpq_are_those_of_the_softmax():
    torch.manual_seed(0)
    table = DifferentiablePQ(tables("bytes=12000", optimizer="adam"), tail_share=1.0).modules[0]
    ids, weights = torch.tensor([4, 9, 4]), torch.randn(3, 16)
    (table(ids) * weights).sum().backward()
    found = {name: own.grad.clone() for name, own in table.named_parameters()}
    table.zero_grad()
    queries = table.queries[ids].view(3, table.shape.parts, -1).transpose(0, 1)
    soft = (queries @ table.keys.transpose(1, 2)).softmax(2) @ table.values
    (soft.transpose(0, 1).reshape(3, -1) * weights).sum().backward()
    for name, own in table.named_parameters():
        torch.testing.assert_close(found[name], own.grad)


def test_hot_ids_get_rows_of_their_own():
    torch.manual_seed(0)
    made = first_try("CAFE", model="gmf")
    for step in range(1, 30):
        made.lookup(torch.tensor([[0, 300], [0, 301 + step]]), True).sum().backward()
        made.step()
        made.after(step)
    assert made.index[0] < made.hot_rows <= made.index[299]
    assert made.index[299] == made.shared[299]


@pytest.mark.parametrize(
    "name", ["CCE, as published", "low rank", "DPQ", "hash embeddings", "CAFE"]
)
def test_a_budget_that_is_too_small_is_told_with_its_reason(name):
    with pytest.raises(DoesNotFit, match=r"values|bytes"):
        first_try(name, "bytes=80", model="gmf")


def test_a_tensor_train_computes_all_rows_as_it_does_some():
    torch.manual_seed(0)
    train = TensorTrain(thirds(300), [2, 2, 4], 3, 0.1)
    ids, weights = torch.tensor([299, 7, 7]), torch.randn(3, 16)
    found = []
    for times in (0, 1000):
        with (
            mock.patch.object(tensor_train, "_WHOLE", times),
            mock.patch.object(train, "_whole", wraps=train._whole) as whole,
        ):
            out = train(ids)
        assert whole.called == (times == 1000)
        found.append((out, *torch.autograd.grad((out * weights).sum(), list(train.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", [1, 7, 26_735, 30_984])
def test_cores_of_a_tensor_train_hold_every_id(size):
    n1, n2, n3 = thirds(size)
    assert size <= n1 * n2 * n3 < 1.3 * size + 8
    d1, d2, d3 = factors(32)
    assert d1 * d2 * d3 == 32
