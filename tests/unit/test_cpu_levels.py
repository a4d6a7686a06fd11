"""Compiled kernels are chosen by what the CPU has, and give the same at every level."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cpu_levels import at_level, forget
from cce_torchrec import compiled, cpu_level
from cce_torchrec.kmeans import native as kmeans
from cce_torchrec.lookup import native
from cce_torchrec.packing import CodePacking
from tests.support.torchrun import forked

TESTS = Path(__file__).parent
LEVELS = cpu_level.LEVELS[: cpu_level.LEVELS.index(cpu_level.highest_level()) + 1]
LOWER = LEVELS[:-1]
OPS = torch.ops.cce_torchrec
needs_native = pytest.mark.skipif(
    not (native.available() and kmeans.available()), reason="built without a C++ compiler"
)


@pytest.mark.parametrize(
    "torchs, variable, level",
    [
        ("DEFAULT", None, "none"),
        ("AVX2", None, "avx2"),
        ("AVX512", None, "avx512"),
        ("AVX512_AMX", None, "avx512"),  # what a later torch may say
        ("SVE256", None, "none"),
        ("AVX512", "avx2", "avx2"),
        ("AVX2", "none", "none"),
        ("AVX2", "avx2", "avx2"),
    ],
)
def test_the_level_is_what_torch_found_or_a_lower_one(monkeypatch, torchs, variable, level):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torchs)
    monkeypatch.delenv("CCE_CPU_LEVEL", raising=False)
    if variable is not None:
        monkeypatch.setenv("CCE_CPU_LEVEL", variable)
    assert cpu_level.cpu_level() == level
    levels = cpu_level.levels_below()
    assert levels[0] == level and levels[-1] == "none"


@pytest.mark.parametrize("wanted", ["avx512", "AVX2", "", "sse"])
def test_a_level_that_the_cpu_lacks_is_refused(monkeypatch, wanted):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("CCE_CPU_LEVEL", wanted)
    told = f"CCE_CPU_LEVEL is '{wanted}', and this processor runs none, avx2; name one"
    try:
        forget()
        with pytest.raises(ValueError, match=told):
            native.available()
    finally:
        monkeypatch.undo()
        forget()


@needs_native
def test_without_a_level_the_next_lower_one_is_used(monkeypatch, tmp_path):
    built = Path(native.__file__).parent
    (tmp_path / "_native.so").symlink_to(built / "_native.so")
    (tmp_path / "_native_avx2.so").write_text("cut short")
    (tmp_path / "_native_other.so").symlink_to(built / "_native.so")  # not a level, not looked at
    found = compiled.library.__wrapped__(tmp_path, ("cce_count_bags",))
    assert found._name == str(tmp_path / "_native.so")


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_the_library_of_the_level_is_loaded(level):
    file = "_native.so" if level == "none" else f"_native_{level}.so"
    with at_level(level):
        for kernels in (native.kernels(), kmeans.kernels()):
            assert Path(kernels._name).name == file


def rows_of(seed, code_bits, id_type, dim):
    """Expanded rows of a table and of a plain one, some of whose ids are out of bounds."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-9, 5100, (1000,), generator=g).to(id_type)
    codes = torch.randint(1 << code_bits, (5000, 4), generator=g).int()
    chunks = torch.randint(1 << 40, (4, 5), generator=g)
    chunks[:, 0] = torch.arange(4)
    packed, rows = CodePacking(code_bits).pack(codes), 1 << code_bits
    outs = [torch.empty(8000, dtype=torch.int64), torch.empty(1000, dtype=torch.int64)]
    bad = native.expand([
        native.Job(ids, 5000, outs[0], chunks, packed, code_bits, rows, 3 * rows),
        native.Job(ids, 5000, outs[1]),
    ])  # fmt: skip
    return [*outs, torch.tensor(bad)]


def trained(seed, code_bits, id_type, dim):
    """Weights and states after a step of row-wise Adagrad, with and without weights of ids."""
    g, result = torch.Generator().manual_seed(seed), []
    for weighted in (False, True):
        weights = [torch.rand(50, dim, generator=g), torch.rand(300, 4 * dim, generator=g)]
        states = [torch.rand(50, generator=g), torch.rand(300, generator=g)]
        indices = torch.randint(50, (120,), generator=g)
        offsets = torch.arange(0, 121, 4)
        sample = torch.rand(120, generator=g) if weighted else None
        grad = torch.randn(10, 6 * dim, generator=g)
        OPS.rowwise_adagrad(weights, states, [2, 1], grad, indices, offsets, sample, 0.1, 1e-8)
        result += weights + states
    return result


def clustered(seed, code_bits, id_type, dim):
    """Nearest by sums of scores and by products, for vectors that are no near ties."""
    g, found = torch.Generator().manual_seed(seed), []
    main, helper = torch.randn(40, dim, generator=g), torch.randn(60, dim, generator=g)
    keys = torch.randint(2400, (500,), generator=g).sort().values
    a, b = (keys // 60).int(), (keys % 60).int()
    for k in (1, 77, 300, 2500):
        centroids = torch.randn(k, dim, generator=g)
        scorer = kmeans.PairScorer(main, helper, k)
        scorer.score(centroids)
        found += [scorer.nearest(a, b)]
        found += [kmeans.PointScorer(centroids).of_vectors(main[a.long()] + helper[b.long()])]
    return found


def counted(seed, code_bits, id_type, dim):
    """Counts of pairs, residuals, and codes that are written anew."""
    g = torch.Generator().manual_seed(seed)
    codes, packing = (
        torch.randint(1 << code_bits, (1000, 2), generator=g).int(),
        CodePacking(code_bits),
    )
    packed, rows = packing.pack(codes), 1 << code_bits
    column = (packed, None, code_bits, 1, 0, 3, 990)
    new_codes = torch.randint(rows, (987,), generator=g, dtype=torch.int32)
    counts = torch.zeros(rows * 9, dtype=torch.int64)
    OPS.count_pairs(*column, 2**61 + 1, 7, 9, None, counts)
    books = [
        torch.randint(1 << 20, (n, dim), generator=g, dtype=torch.int32) for n in (rows, 9, rows)
    ]
    sums, sizes = torch.zeros(9, dim, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    OPS.residuals(*column, new_codes, False, 2**61 + 1, 7, 3**30, 5, *books, sums, sizes)
    changed = OPS.relabel(*column, new_codes, False, 2**61 + 1, 7, 9, True)
    return [counts, sums, sizes, changed, packed]


@needs_native
@pytest.mark.parametrize("work", [rows_of, trained, clustered, counted])
@pytest.mark.parametrize("dim", [4, 8, 16, 20, 32, 48])
def test_levels_give_the_same_bits(work, dim):
    """Ids, codes, sums of integers and the backward; the nearest where no two are as near."""
    for seed, (bits, ids) in enumerate(itertools.product([3, 8, 14], [torch.int32, torch.int64])):
        results = {}
        for level in LEVELS:
            with at_level(level):
                results[level] = work(seed, bits, ids, dim)
        for level, result in results.items():
            for one, other in zip(result, results["none"], strict=True):
                assert torch.equal(one, other), level


@needs_native
@pytest.mark.skipif(len(LEVELS) < 3, reason="this processor has no two levels with FMA")
@pytest.mark.parametrize("dim", [3, 8, 17])
def test_levels_with_fma_choose_alike_among_equals(dim):
    """Where many centroids are as near but for rounding, which products and sums do once."""
    g = torch.Generator().manual_seed(dim)
    centroids = torch.randn(1, dim, generator=g) + 3e-7 * torch.randn(400, dim, generator=g)
    x, found = torch.randn(3000, dim, generator=g), {}
    for level in LEVELS:
        with at_level(level):
            found[level] = kmeans.PointScorer(centroids).of_vectors(x)
    assert torch.equal(found["avx2"], found["avx512"])
    # That of two roundings differs here, by which the test is known to look at rounding.
    assert not torch.equal(found["none"], found["avx2"])


KERNELS = "expand or backward or compiled or native"
"""Of the tests of `run_tests` those that run them."""


def run_tests(argv):
    """The tests of kernels, in a process of the level in its environment."""
    files = [str(TESTS / f"test_{name}.py") for name in ("expand", "bags", "backward", "kmeans")]
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", KERNELS, *files, *argv]))


@needs_native
@pytest.mark.parametrize("level", LOWER)
def test_tests_of_kernels_pass_at_each_level(monkeypatch, level):
    monkeypatch.setenv("CCE_CPU_LEVEL", level)
    done = forked(1, run_tests)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
