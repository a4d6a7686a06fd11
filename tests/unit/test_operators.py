"""Compiled kernels as operators of torch: schemas, kernels without data, equal results."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from cce_torchrec.kmeans import native as kmeans
from cce_torchrec.lookup import backward, native  # noqa: F401  # which registers its own

pytestmark = pytest.mark.skipif(
    not (native.available() and kmeans.available()), reason="built without a C++ compiler"
)
OPS = torch.ops.cce_torchrec
ROWS, HELPERS, DIM, K = 6, 9, 8, 5


def ints(high, *shape, dtype=torch.int32):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def pairs():
    keys = torch.arange(0, ROWS * HELPERS, 2)
    return (keys // HELPERS).int(), (keys % HELPERS).int()


def points():
    """Both codebooks in fixed point, and the pairs of their rows."""
    return ints(1 << 20, ROWS, DIM), ints(1 << 20, HELPERS, DIM), *pairs()


def centroids():
    panels = torch.rand(kmeans.GROUP // kmeans.PANEL, DIM, kmeans.PANEL)
    return panels, torch.rand(kmeans.GROUP)


def column(dtype=torch.uint8):
    """Codes of ids from 8 on, and which of them: column, base, first and last id."""
    return ints(ROWS, 20, 2, dtype=dtype), 1, 8, 16, 28


def expansion():
    chunks = torch.tensor([[0, 3, 4, 5, 6], [1, 7, 8, 9, 10]])
    ids = [torch.tensor([1, 40, 2]), torch.tensor([3, -1], dtype=torch.int32)]
    codes, outs = ints(ROWS, 30, 2, dtype=torch.uint8), [zeros(12), zeros(2)]
    return ids, [30, 7], outs, [chunks, None], [codes, None], [ROWS, 0], [HELPERS, 0]


def jobs(parts):
    """The arguments of the operator as the direct call has them."""
    return [native.Job(*job) for job in zip(*parts, strict=True)]


def adagrad(weights=None):
    tables = [torch.rand(ROWS, DIM), torch.rand(HELPERS, 4)]
    states = [torch.rand(ROWS), torch.rand(HELPERS)]
    grad = torch.rand(3, 2 * DIM + 4)
    offsets = torch.tensor([0, 2, 2, 3, 4, 5, 6, 7, 7, 8])
    return (
        tables,
        states,
        [2, 1],
        grad,
        ints(ROWS, 8, dtype=torch.int64),
        offsets,
        weights,
        0.1,
        1e-8,
    )


CALLS = {
    "expand": expansion,
    "rowwise_adagrad": adagrad,
    "rowwise_adagrad, weighted": lambda: adagrad(torch.rand(8)),
    "nearest_sums": lambda: (torch.rand(ROWS, 16), torch.rand(HELPERS, 16), *pairs()),
    "nearest_vectors": lambda: (torch.rand(30, DIM), *centroids()),
    "nearest_pairs": lambda: (*points(), 2.0**-20, *centroids()),
    "accumulate": lambda: (
        *points(), ints(9, 27, dtype=torch.int64), ints(K, 27), torch.rand(K, DIM).double(),
        2.0**-20, 1e6, zeros(K, DIM), zeros(K), zeros(K),
    ),
    "count_pairs": lambda: (*column(), 3, 4, HELPERS, None, zeros(ROWS * HELPERS)),
    "count_pairs, weighted": lambda: (
        *column(torch.int16), 3, 4, HELPERS, ints(9, 12, dtype=torch.int64), zeros(ROWS * HELPERS)
    ),
    "residuals": lambda: (
        *column(), ints(K, ROWS * HELPERS, dtype=torch.uint8), True, 3, 4, 5, 6,
        ints(99, ROWS, DIM), ints(99, HELPERS, DIM), ints(99, K, DIM), zeros(HELPERS, DIM),
        zeros(HELPERS),
    ),
    "relabel": lambda: (
        *column(torch.int32), ints(K, 12, dtype=torch.int32), False, 3, 4, HELPERS, True
    ),
}  # fmt: skip


def operator(name):
    return getattr(OPS, name.partition(",")[0]).default


def test_every_operator_is_called_here():
    registered = {
        name.removeprefix("cce_torchrec::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("cce_torchrec::")
    }
    assert registered == {name.partition(",")[0] for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_schema_and_fake_kernel(name):
    """What is written to is marked, and nothing else is; graphs can have it."""
    torch.library.opcheck(operator(name), CALLS[name]())


@pytest.mark.parametrize("name", CALLS)
def test_without_data_shapes_and_types_are_the_same(name):
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, CALLS[name]())
        fake = operator(name)(*fakes)
    real = operator(name)(*CALLS[name]())
    assert (fake is None) == (real is None)
    if real is not None:
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


def test_expansion_says_what_is_out_of_bounds():
    by_address, by_operator = expansion(), expansion()
    found = native.expand(jobs(by_address))
    assert found == [(1, 1), (1, 1)]
    assert OPS.expand(*by_operator).tolist() == [list(pair) for pair in found]
    assert all(torch.equal(a, b) for a, b in zip(by_address[2], by_operator[2], strict=True))


def test_a_traced_expansion_calls_the_operator():
    with FakeTensorMode() as mode:
        parts = tree_map_only(torch.Tensor, mode.from_tensor, expansion())
        assert native.is_traced(parts[0][0])
        assert native.expand(jobs(parts), counts=False) == []
    assert not native.is_traced(torch.zeros(1))


def test_strides_that_an_address_does_not_tell_are_refused():
    main, helper, a, b, *rest = CALLS["nearest_pairs"]()
    with pytest.raises(AssertionError):
        OPS.nearest_pairs(main, helper, a.repeat_interleave(2)[::2], b, *rest)
