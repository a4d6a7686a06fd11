"""CCEEmbeddingBagConfig: arithmetic, budgets, and the errors a user can run into."""

from dataclasses import replace

import numpy as np
import pytest
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig


def config(**kwargs):
    defaults = dict(
        name="user", num_embeddings=1000, embedding_dim=32, feature_names=["f"], num_rows=16
    )
    return CCEEmbeddingBagConfig(**{**defaults, **kwargs})


def test_bytes():
    table = config()
    assert (table.helper_rows, table.rows_per_chunk, table.chunk_dim) == (48, 64, 8)
    assert table.codebook_bytes == 64 * 32 * 4
    assert (table.code_bits, table.code_bytes) == (4, 1000 * 4 // 2)
    assert table.table_bytes == table.codebook_bytes + table.code_bytes
    assert config(data_type=DataType.FP16).codebook_bytes == 64 * 32 * 2
    assert config(learned_codes=False).code_bytes == 0


@pytest.mark.parametrize(
    ("rows", "bits"),
    [
        *((1, 0), (2, 1), (4, 2), (5, 3), (16, 4), (17, 6), (64, 6), (65, 8), (256, 8), (257, 10)),
        *((4096, 12), (8192, 14), (65_536, 16), (65_537, 20), (2**31 - 1, 32)),
    ],
)
def test_bits_of_codes(rows, bits):
    table = config(num_rows=rows, num_helper_rows=0)
    assert table.code_bits == bits
    # 1,000 ids are whole groups whatever their bits.
    assert table.code_bytes == 1000 * 4 * bits // 8
    assert replace(table, learned_codes=False).code_bits == 0


def test_codes_of_frequent_ids_take_a_part_of_a_budget_of_bytes():
    """And leave no room: a row more is more than the budget."""
    kwargs = dict(name="t", num_embeddings=100_000, embedding_dim=32, feature_names=["f"])
    budgets = (300, 49_000, 51_000, 60_000, 100_000, 150_000, 350_000, 1_000_000, 3_000_000, 10**7)
    for budget in budgets:
        table = CCEEmbeddingBagConfig.from_bytes(budget, **kwargs)
        assert table.num_chunks == 4
        share = 1.5 if table.num_rows <= 16 else 0.5
        assert table.code_bytes <= share * table.codebook_bytes
        assert 3 * table.num_rows <= table.num_helper_rows + 2  # rounded
        assert table.table_bytes <= budget < table.table_bytes + 128
    bits = [CCEEmbeddingBagConfig.from_bytes(budget, **kwargs).code_bits for budget in budgets]
    assert bits == [0, 0, 0, 0, 1, 1, 4, 6, 12, 14]
    asked = CCEEmbeddingBagConfig.from_bytes(1_000_000, helper_ratio=1, **kwargs)
    assert abs(asked.num_rows - asked.num_helper_rows) <= 1  # as asked for, whatever codes take
    counted = CCEEmbeddingBagConfig.from_params_per_dim(6_000, count_codes=True, **kwargs)
    assert (counted.num_rows, counted.num_helper_rows, counted.num_chunks) == (64, 5_936, 4)
    few = CCEEmbeddingBagConfig.from_params_per_dim(8, count_codes=True, **kwargs)
    assert (few.num_rows, few.num_helper_rows) == (
        1,
        7,
    )  # one bit an id is 50 times that


def test_a_budget_is_kept_once_the_table_is_finalized():
    kwargs = dict(name="t", num_embeddings=20_000, embedding_dim=16, feature_names=["f"])
    for budget in (11_000, 60_000, 100_000, 500_000):
        table = CCEEmbeddingBagConfig.from_bytes(budget, finalized=True, **kwargs)
        more = replace(table, num_helper_rows=table.num_helper_rows + 1)
        after = [made.finalized().table_bytes for made in (table, more)]
        assert table.table_bytes <= after[0] <= budget < after[1]
        assert abs(3 * table.num_rows - table.num_helper_rows) <= 3
    # Two rows a chunk are told apart by a bit an id and chunk.
    with pytest.raises(ValueError, match="two rows a chunk, which take 10128 once they are fin"):
        CCEEmbeddingBagConfig.from_bytes(10_127, finalized=True, **kwargs)
    # Rare ids keep their helper, and tables of hashed codes have nothing to finalize.
    for more in ({"recipe": "rare"}, {"learned_codes": False}):
        made = [
            CCEEmbeddingBagConfig.from_bytes(100_000, finalized=on, **kwargs, **more)
            for on in (False, True)
        ]
        assert made[0].num_rows == made[1].num_rows
        assert made[0].num_helper_rows == made[1].num_helper_rows


@pytest.mark.parametrize(
    ("dim", "chunks"), [(4, 1), (8, 2), (12, 3), (16, 4), (20, 5), (32, 8), (256, 8)]
)
def test_a_budget_of_parameters_makes_up_to_8_chunks(dim, chunks):
    kwargs = dict(name="t", num_embeddings=1000, embedding_dim=dim, feature_names=["f"])
    assert CCEEmbeddingBagConfig.from_params_per_dim(64, **kwargs).num_chunks == chunks
    if dim == 20:
        with pytest.raises(ValueError, match="use 16 or 32"):
            CCEEmbeddingBagConfig.from_bytes(64 * dim * 4, **kwargs)
        return
    by_bytes = CCEEmbeddingBagConfig.from_bytes(64 * dim * 4, **kwargs)
    assert by_bytes.num_chunks == min(4, chunks)
    given = CCEEmbeddingBagConfig.from_params_per_dim(64, **{**kwargs, "num_chunks": 1})
    assert given.num_chunks == 1


@pytest.mark.parametrize("dim", [6, 0, "16", None])
def test_a_width_that_fits_no_chunk_is_refused_by_budgets_too(dim):
    kwargs = dict(name="t", num_embeddings=1000, embedding_dim=dim, feature_names=["f"])
    with pytest.raises(ValueError, match=r"table 't'.*embedding_dim"):
        CCEEmbeddingBagConfig.from_params_per_dim(64, **kwargs)


def test_budgets():
    kwargs = dict(name="t", num_embeddings=1000, embedding_dim=32, feature_names=["f"])
    table = CCEEmbeddingBagConfig.from_params_per_dim(64, **kwargs)
    assert (table.num_rows, table.num_helper_rows) == (16, 48)
    for budget in (300, 2_300, 20_000, 200_000):
        table = CCEEmbeddingBagConfig.from_bytes(budget, **kwargs)
        assert table.table_bytes <= budget < table.table_bytes + 32 * 4  # a row of each chunk
    with pytest.raises(ValueError, match=r"table 't'.*two rows a chunk"):
        CCEEmbeddingBagConfig.from_bytes(200, **kwargs)
    of_float = CCEEmbeddingBagConfig.from_bytes(2e4, **kwargs)
    assert of_float.num_rows == CCEEmbeddingBagConfig.from_bytes(20_000, **kwargs).num_rows
    vast = CCEEmbeddingBagConfig.from_bytes(2**41, **{**kwargs, "embedding_dim": 16})
    assert vast.rows_per_chunk == 2**31 - 1
    for ratio in (-1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"table 't'.*helper_ratio .* number of 0 or more"):
            CCEEmbeddingBagConfig.from_params_per_dim(64, helper_ratio=ratio, **kwargs)
    with pytest.raises(ValueError, match=r"table 't': helper_ratio '3' is no finite number"):
        CCEEmbeddingBagConfig.from_bytes(20_000, helper_ratio="3", **kwargs)
    for budget in (float("inf"), float("nan"), "1e6", None):
        with pytest.raises(ValueError, match=r"table 't': table_bytes .* is no finite number"):
            CCEEmbeddingBagConfig.from_bytes(budget, **kwargs)
    with pytest.raises(ValueError, match=r"table 't'.*params_per_dim 64.5 is not a whole number"):
        CCEEmbeddingBagConfig.from_params_per_dim(64.5, **kwargs)


@pytest.mark.parametrize("ratio", [None, 0, 1, 3])
def test_budgets_in_numbers_of_numpy(ratio):
    kwargs = dict(name="t", num_embeddings=np.int64(1000), embedding_dim=np.int64(32))
    rows = CCEEmbeddingBagConfig.from_params_per_dim(np.int64(100), helper_ratio=ratio, **kwargs)
    assert rows.rows_per_chunk == 100
    of_bytes = CCEEmbeddingBagConfig.from_bytes(np.int64(20_000), helper_ratio=ratio, **kwargs)
    assert 19_000 < of_bytes.table_bytes <= 20_000
    assert type(of_bytes.table_bytes) is int


def test_tables_without_codes_divide_bytes_by_the_ratio():
    kwargs = dict(name="t", num_embeddings=100_000, embedding_dim=32, learned_codes=False)
    table = CCEEmbeddingBagConfig.from_bytes(1_000_000, **kwargs)
    assert (table.num_rows, table.num_helper_rows) == (1953, 5859)


def test_numbers_of_numpy_become_pythons():
    table = config(num_embeddings=np.int64(1000), num_rows=np.int32(16), seed=np.uint8(3))
    assert [type(v) for v in (table.num_embeddings, table.table_bytes, table.seed)] == [int] * 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embedding_dim": 30}, "embedding_dim 30 is not divisible by num_chunks 4.*use 16 or 32"),
        ({"embedding_dim": 8}, "embedding_dim 8.*multiple of 4.*use 16"),
        ({"num_rows": 2**30, "num_helper_rows": 2**31}, "more than a code can hold"),
        ({"pooling": "max"}, "pooling 'max' is not SUM or MEAN"),
        ({"pooling": PoolingType.NONE}, "is not SUM or MEAN"),
        ({"name": "a#b"}, "no '#', which marks the chunks"),
        ({"name": "user.id"}, "hold no '.'"),
        ({"name": "type"}, "of a module, such as 'type'"),
        ({"name": 3}, "torch keeps tables as modules by their names"),
        ({"examples_per_id": float("nan")}, "examples_per_id nan is no finite number of 0 or more"),
        ({"examples_per_id": "3", "recipe": "auto"}, "examples_per_id '3' is no finite number"),
        ({"examples_per_id": -1.0, "recipe": "auto"}, "examples_per_id -1.0 is no finite number"),
        ({"track_counts": "yes"}, "track_counts 'yes' is no bool"),
        ({"num_rows": 0}, "num_rows has no default"),
        ({"num_rows": 16.0}, "num_rows 16.0 is not a whole number"),
        ({"num_embeddings": 1e6}, "num_embeddings 1000000.0 is not a whole number"),
        ({"num_helper_rows": -1}, "num_helper_rows -1 is negative"),
        ({"data_type": DataType.INT8}, "use FP32, FP16 or BF16"),
        ({"need_pos": True}, "need_pos=True has no meaning"),
        ({"use_virtual_table": True}, "use_virtual_table=True has no meaning"),
    ],
)
def test_bad_fields(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        config(**kwargs)
    assert "table" in str(error.value)


def test_bad_collections():
    with pytest.raises(ValueError, match="table 'user' is configured 2 times"):
        CCEEmbeddingBagCollection(tables=[config(), config()])
    plain = EmbeddingBagConfig(name="a#b", num_embeddings=3, embedding_dim=4, feature_names=["f"])
    with pytest.raises(ValueError, match="'#' marks the chunks"):
        CCEEmbeddingBagCollection(tables=[plain])


@pytest.mark.parametrize("table_bytes", [3_000, 9_000, 43_000])
@pytest.mark.parametrize(("dim", "chunks"), [(4, 1), (16, 4), (24, 6), (32, 8), (64, 8)])
def test_budgets_of_rare_ids(table_bytes, dim, chunks):
    """No codes, which are not worth their bytes, and so more chunks where the width allows."""
    kwargs = dict(name="t", num_embeddings=1000, embedding_dim=dim, feature_names=["f"])
    table = CCEEmbeddingBagConfig.from_bytes(table_bytes, recipe="rare", **kwargs)
    assert (table.num_rows, table.num_chunks, table.recipe) == (1, chunks, "rare")
    assert table.code_bytes == 0 and table_bytes - 4 * dim < table.table_bytes <= table_bytes
    auto = CCEEmbeddingBagConfig.from_bytes(table_bytes, recipe="auto", examples_per_id=2, **kwargs)
    assert (auto.num_rows, auto.num_chunks) == (1, chunks)
    hashed = CCEEmbeddingBagConfig.from_bytes(table_bytes, learned_codes=False, **kwargs)
    assert hashed.num_chunks == chunks
    frequent = CCEEmbeddingBagConfig.from_bytes(
        table_bytes, recipe="auto", examples_per_id=200, **kwargs
    )
    assert frequent.num_chunks == next(c for c in (4, 3, 2, 1) if dim % (4 * c) == 0)
    counted = CCEEmbeddingBagConfig.from_params_per_dim(
        64, recipe="rare", count_codes=True, **kwargs
    )
    assert (counted.num_rows, counted.num_chunks) == (1, chunks)
    named = CCEEmbeddingBagConfig.from_bytes(table_bytes, recipe="rare", num_chunks=1, **kwargs)
    assert named.num_chunks == 1


def test_budget_of_rare_ids_that_is_too_small():
    kwargs = dict(name="t", num_embeddings=1000, embedding_dim=16, feature_names=["f"])
    with pytest.raises(ValueError, match=r"'t': 100 bytes do not hold two rows"):
        CCEEmbeddingBagConfig.from_bytes(100, recipe="rare", **kwargs)
