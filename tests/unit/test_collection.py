"""The unsharded module against a plain reference: a loop over bags, ids and chunks."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.codes.hashing import helper_hash
from tests.support import models
from tests.support.models import MEAN, SUM


def tables(pooling=SUM):
    """Those of other tests, one of them without helper rows, and one without learned codes."""
    wide, plain, many = models.tables(pooling)
    return [
        wide,
        replace(plain, pooling=pooling),
        replace(many, num_helper_rows=0),
        CCEEmbeddingBagConfig(
            name="ce", num_embeddings=50, embedding_dim=16, feature_names=["k"], num_rows=7,
            num_helper_rows=0, learned_codes=False, pooling=pooling,
        ),
    ]  # fmt: skip


def batch(weighted=False):
    """Ids that suit every table; some bags are empty, one feature is not configured."""
    return models.batch(0, weighted, keys=["k", "g", "unused", "h", "f"])


def embedding(module, config, id_):
    if not isinstance(config, CCEEmbeddingBagConfig):
        return module.embedding_bag_collection.embedding_bags[config.name].weight[id_]
    chunks = []
    codes = module.codes[config.name]
    for j in range(config.num_chunks):
        weight = module.embedding_bag_collection.embedding_bags[f"{config.name}#{j}"].weight
        row = weight[int(codes.main_rows(torch.tensor([id_]))[j])]
        if config.num_helper_rows:
            hashed = helper_hash(config.seed, config.name, j, codes.num_clusterings)
            row = row + weight[config.num_rows + int(hashed(torch.tensor(id_), config.helper_rows))]
        chunks.append(row)
    return torch.cat(chunks)


def reference(module, kjt):
    out = {}
    jagged = kjt.to_dict()
    for config in module.embedding_bag_configs():
        for feature in config.feature_names:
            bags = []
            offsets = jagged[feature].offsets().tolist()
            for start, end in itertools.pairwise(offsets):
                total = torch.zeros(config.embedding_dim)
                for i in range(start, end):
                    weight = jagged[feature].weights()[i] if module.is_weighted() else 1.0
                    row = embedding(module, config, int(jagged[feature].values()[i]))
                    total = total + weight * row
                if config.pooling == MEAN:
                    total = total / max(1, end - start)
                bags.append(total)
            out[config.name, feature] = torch.stack(bags)
    return out


@pytest.mark.parametrize("pooling", [SUM, MEAN])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_reference(pooling, weighted):
    module = CCEEmbeddingBagCollection(tables=tables(pooling), is_weighted=weighted)
    kjt = batch(weighted)
    out = module(kjt)
    assert out.keys() == ["f@t", "g", "h@p", "f@p", "h@u", "k"]
    assert out.length_per_key() == [16, 16, 8, 8, 8, 16]
    expected = torch.cat(list(reference(module, kjt).values()), dim=1)
    torch.testing.assert_close(out.values(), expected)


def test_callers_batch_is_not_written_to():
    module = CCEEmbeddingBagCollection(tables=tables())
    kjt = batch()
    kjt.values()[-1] = 10**6
    before = copy.deepcopy((kjt.keys(), kjt.values(), kjt.lengths()))
    module(kjt)
    after = (kjt.keys(), kjt.values(), kjt.lengths())
    assert before[0] == after[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


def test_state_dict_keys_are_pinned():
    module = CCEEmbeddingBagCollection(tables=tables()[:2])
    prefix = "embedding_bag_collection.embedding_bags"
    assert list(module.state_dict()) == [
        *(f"{prefix}.t#{j}.weight" for j in range(4)),
        f"{prefix}.p.weight",
        "codes.t.codes",
        "codes.t.clusterings",
        "codes.t.num_helper_rows",
    ]


def test_save_and_load_keep_codes_and_hash():
    module, other = (CCEEmbeddingBagCollection(tables=tables()) for _ in range(2))
    module.codes["t"].codes.random_(0, 5)
    module.codes["t"].set_clusterings(3)
    other.load_state_dict(module.state_dict())
    assert other.codes["t"].num_clusterings == 3
    assert torch.equal(module(batch()).values(), other(batch()).values())


@pytest.mark.parametrize("name", ["t", "p"])
@pytest.mark.parametrize("bad", [-1, 10**6])
def test_ids_out_of_bounds(name, bad, caplog):
    config = next(c for c in tables() if c.name == name)
    kjt = KeyedJaggedTensor(
        keys=config.feature_names,
        values=torch.tensor([3, bad, 5, 1]),
        lengths=torch.tensor([2, 0, 1, 1]),
    )
    fatal = CCEEmbeddingBagCollection(tables=[config], bounds_check_mode=BoundsCheckMode.FATAL)
    with pytest.raises(ValueError, match=f"table '{name}', feature .*id {bad} is outside"):
        fatal(kjt)
    module = CCEEmbeddingBagCollection(tables=[config])
    clean = KeyedJaggedTensor(
        keys=config.feature_names, values=torch.tensor([3, 0, 5, 1]), lengths=kjt.lengths()
    )
    assert torch.equal(module(kjt).values(), module(clean).values())
    assert module.num_invalid_ids == 1
    assert "reading id 0" in caplog.text


def test_output_is_put_in_order_without_slices():
    """The gradient of each slice is as large as the whole output; that of a split is one copy."""
    values = CCEEmbeddingBagCollection(tables=tables())(batch()).values()
    seen, nodes = set(), [values.grad_fn]
    while nodes:
        node = nodes.pop()
        seen.add(node.name())
        nodes += [before for before, _ in node.next_functions if before is not None]
    assert "SplitWithSizesBackward0" in seen and "SliceBackward0" not in seen


def test_missing_features_and_weights():
    module = CCEEmbeddingBagCollection(tables=tables(), is_weighted=True)
    with pytest.raises(ValueError, match="lacks features 'k' \\(table 'ce'\\)"):
        module(batch(True).permute([1, 3, 4]))
    with pytest.raises(ValueError, match="has no weights"):
        module(batch())


def test_meta_device_materialises_with_hashed_codes():
    module = CCEEmbeddingBagCollection(tables=tables(), device="meta")
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    fresh = CCEEmbeddingBagCollection(tables=tables())
    assert torch.equal(module.codes["t"].codes, fresh.codes["t"].codes)


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_uncompressed_table_equals_plain_table(num_chunks):
    """num_rows = num_embeddings, no helper, codes = ids: the plain table, trained too."""
    common = dict(name="t", num_embeddings=50, embedding_dim=8, feature_names=["f"])
    plain = EmbeddingBagCollection(tables=[EmbeddingBagConfig(**common)])
    cce = CCEEmbeddingBagCollection(
        tables=[
            CCEEmbeddingBagConfig(num_rows=50, num_helper_rows=0, num_chunks=num_chunks, **common)
        ]
    )
    codes = cce.codes["t"]
    codes.codes.copy_(codes.packing.pack(torch.arange(50)[:, None].expand(-1, num_chunks)))
    assert torch.equal(codes.unpacked[:, 0], torch.arange(50))
    width = 8 // num_chunks
    with torch.no_grad():
        for j in range(num_chunks):
            cce.embedding_bag_collection.embedding_bags[f"t#{j}"].weight.copy_(
                plain.embedding_bags["t"].weight[:, j * width : (j + 1) * width]
            )
    kjt = KeyedJaggedTensor(
        keys=["f"], values=torch.randint(0, 50, (20,)), lengths=torch.full((5,), 4)
    )
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, cce)]
    for _ in range(3):
        outputs = [m(kjt).values() for m in (plain, cce)]
        assert torch.equal(*outputs)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().sum().backward()
            optimizer.step()


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16])
def test_half_precision_codebooks(data_type):
    config = tables()[0]
    config.data_type = data_type
    module = CCEEmbeddingBagCollection(tables=[config])
    weight = module.embedding_bag_collection.embedding_bags["t#0"].weight
    assert weight.element_size() == 2
    kjt = batch()
    expected = torch.cat([v for v in reference(module, kjt).values()], dim=1)
    torch.testing.assert_close(module(kjt).values().float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_initial_scale_is_that_of_a_plain_table():
    common = dict(
        name="t", num_embeddings=10_000, embedding_dim=16, feature_names=["f"],
        weight_init_min=-0.25, weight_init_max=0.75,
    )  # fmt: skip
    module = CCEEmbeddingBagCollection(tables=[CCEEmbeddingBagConfig(num_rows=1000, **common)])
    kjt = KeyedJaggedTensor(
        keys=["f"], values=torch.arange(10_000), lengths=torch.ones(10_000, dtype=torch.long)
    )
    values = module(kjt).values().detach()
    assert abs(float(values.mean()) - 0.25) < 0.01
    assert abs(float(values.std()) - 1 / 12**0.5) < 0.01
    constant = CCEEmbeddingBagConfig(
        num_rows=10, init_fn=lambda w: torch.nn.init.constant_(w, 0.5), **common
    )
    assert torch.equal(
        CCEEmbeddingBagCollection(tables=[constant])(kjt).values(), torch.full((10_000, 16), 0.5)
    )


@pytest.mark.parametrize("layout", ["columns", "odd"])
def test_assigned_codes_lie_row_by_row(layout):
    """Kernels read them by address, whatever the checkpoint's tensors are like."""
    module, other = (CCEEmbeddingBagCollection(tables()) for _ in range(2))
    state = module.state_dict()
    codes = state["codes.u.codes"]
    room = codes.new_empty(codes.numel() + 1)[1:].view(codes.shape).copy_(codes)
    state["codes.u.codes"] = codes.t().contiguous().t() if layout == "columns" else room
    other.load_state_dict(state, assign=True)
    kept = other.codes["u"].codes
    assert kept.is_contiguous() and kept.data_ptr() % 8 == 0
    assert torch.equal(other(batch()).values(), module(batch()).values())
