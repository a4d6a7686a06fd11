"""Compiled kernels as operators of torch: schemas, kernels without data, equal results."""

import ctypes

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from cce_torchrec import compiled
from cce_torchrec.kmeans import native as kmeans
from cce_torchrec.lookup import backward, device, native  # noqa: F401  # which registers its own
from cce_torchrec.packing import CodePacking

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


def column(bits=8):
    """Codes of ids from 8 on, and which of them: column, base, first and last id."""
    return CodePacking(bits).pack(ints(ROWS, 20, 2)), None, bits, 1, 8, 16, 28


def expansion():
    chunks = torch.tensor([[0, 3, 4, 5, 6], [1, 7, 8, 9, 10]])
    ids = [torch.tensor([1, 40, 2]), torch.tensor([3, -1], dtype=torch.int32)]
    codes, outs = CodePacking(6).pack(ints(ROWS, 30, 2)), [zeros(12), zeros(2)]
    return ids, [30, 7], outs, [chunks, None], [codes, None], [6, 0], [ROWS, 0], [HELPERS, 0]


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
        *column(12), 3, 4, HELPERS, ints(9, 12, dtype=torch.int64), zeros(ROWS * HELPERS)
    ),
    "residuals": lambda: (
        *column(), ints(K, ROWS * HELPERS, dtype=torch.uint8), True, 3, 4, 5, 6,
        ints(99, ROWS, DIM), ints(99, HELPERS, DIM), ints(99, K, DIM), zeros(HELPERS, DIM),
        zeros(HELPERS),
    ),
    "relabel": lambda: (
        *column(20), ints(K, 12, dtype=torch.int32), False, 3, 4, HELPERS, True
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
        assert native.expand(jobs(parts)).shape == (2, 2)
    assert not native.is_traced(torch.zeros(1))


def apart(tensor):
    """The same values, which are not one after the other."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def each_tensor(args):
    """Paths of the tensors of `args`, the optional ones that are None left out."""
    for i, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            yield (i,)
        elif isinstance(arg, list):
            yield from ((i, j) for j, part in enumerate(arg) if isinstance(part, torch.Tensor))


def replaced(args, path, change):
    args = [list(arg) if isinstance(arg, list) else arg for arg in args]
    holder = args[path[0]] if len(path) > 1 else args
    holder[path[-1]] = change(holder[path[-1]])
    return args


CHANGES = {
    "float16": lambda t: t.to(torch.float16),
    "int8": lambda t: t.to(torch.int8),
    "strides": apart,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CALLS)
def test_what_an_address_does_not_tell_is_refused(name, change):
    """Another type or other strides in any argument of any kernel."""
    paths = list(each_tensor(CALLS[name]()))
    assert paths
    for path in paths:
        args = replaced(CALLS[name](), path, CHANGES[change])
        if name.startswith("rowwise") and change == "strides" and path == (3,):
            continue  # gradients are made contiguous
        with pytest.raises((TypeError, ctypes.ArgumentError), match=r"a compiled kernel takes"):
            operator(name)(*args)


def test_the_gate_names_what_it_got():
    pointer = compiled.Pointer(torch.float32, optional=True)
    assert pointer.from_param(None) is None
    with pytest.raises(TypeError, match=r"torch.float32 .* got torch.float32 \[2\] .* on meta"):
        pointer.address(torch.zeros(2, device="meta"))
    freed = torch.zeros(2)
    freed.untyped_storage().resize_(0)
    with FakeTensorMode():
        fake = torch.zeros(2)
    for nowhere in (freed, fake):  # a kernel would read from address 0
        with pytest.raises(TypeError, match=r"Tensor \[2\] without values"):
            pointer.address(nowhere)
    with pytest.raises(TypeError, match="takes a tensor here, and got 7"):
        pointer.from_param(7)
    rows = compiled.Pointer(torch.float32, by_row=True)
    values = torch.zeros(3, 8)
    assert rows.address(values[:, 4:]) == values.data_ptr() + 16


@pytest.mark.parametrize("change", CHANGES)
def test_codes_that_gpu_kernels_read_pass_the_gate(change):
    """They too go by their address."""
    codes = torch.zeros(4, 2, dtype=torch.uint8)
    bits = torch.zeros(4, dtype=torch.uint8)
    for wrong in (
        {"codes": CHANGES[change](codes)},
        {"codes": codes, "seen": CHANGES[change](bits)},
    ):
        table = device.Table(num_embeddings=4, num_features=1, num_rows=2, **wrong)
        with pytest.raises(
            TypeError, match=r"a compiled kernel takes torch.uint8.* on cpu, and got"
        ):
            device.DeviceTables([table], torch.device("cpu"))
    table = device.Table(num_embeddings=4, num_features=1, num_rows=2, codes=codes, code_bits=8)
    with pytest.raises(TypeError, match=r"on cuda:0, and got torch.uint8 .* on cpu"):
        device.DeviceTables([table], torch.device("cuda", 0))
