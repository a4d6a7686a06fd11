"""The compiled kernels (_native.cpp), where the package was installed with a C++ compiler.

They are optional: `available()` is False without them, and the same work then runs in torch. To
torch each is an operator (`torch.ops.cce_torchrec`), which is called even where nothing is traced:
it costs some microseconds, and a block of 65,536 points or ids takes hundreds.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cce_torchrec import compiled
from cce_torchrec.codes.counts import LEVELS
from cce_torchrec.codes.hashing import HashFunction
from cce_torchrec.kmeans.sources import Sources, Sums
from cce_torchrec.packing import CodePacking

GROUP = 128
"""Columns of scores are padded to a multiple of this (GROUP in _native.cpp)."""
LANES = 16
"""Up to `GROUP` columns of sums of two scores are padded to a multiple of this."""
TILE = 1 << 19
"""Bytes of helper scores that are kept in cache (TILE in _native.cpp)."""
PANEL = 32
"""Centroids that direct products take at once (PANEL in _native.cpp); divides GROUP."""
LOWEST = -3.0e38
"""Score of a padding column; finite, so that adding to it is not NaN."""
_INTEGER, _REAL = ctypes.c_int64, ctypes.c_double
_FLOATS = compiled.Pointer(torch.float32)
_DOUBLES = compiled.Pointer(torch.float64)
_INT32 = compiled.Pointer(torch.int32)
_INT64 = compiled.Pointer(torch.int64)
_CODES = compiled.Pointer(torch.uint8, torch.int16, torch.int32)
_BYTES = compiled.Pointer(torch.uint8)
_NO_FLOATS = compiled.Pointer(torch.float32, optional=True)
_NO_INT32 = compiled.Pointer(torch.int32, optional=True)
_NO_INT64 = compiled.Pointer(torch.int64, optional=True)
_COLUMN_TYPES = [ctypes.c_void_p, _INTEGER, _INTEGER]
_KERNELS: dict[str, list[Any]] = {
    "cce_nearest_sums": [
        _FLOATS, _FLOATS, *[_INTEGER] * 3, _INT32, _INT32, _INTEGER, _INT64, _INT32
    ],
    "cce_nearest_points": [
        _NO_FLOATS, *[_NO_INT32] * 4, _REAL, _FLOATS, _FLOATS, *[_INTEGER] * 3, _FLOATS, _INT32
    ],
    "cce_accumulate": [
        _INT32, _INT32, _INTEGER, _INT32, _INT32, _INT64, _INT32, _INTEGER, _DOUBLES, _REAL, _REAL,
        *[_INT64] * 3
    ],
    "cce_count_pairs_leveled": [*_COLUMN_TYPES, *[_INTEGER] * 3, _NO_INT64, _INT64],
    "cce_residuals_leveled": [
        *_COLUMN_TYPES, _CODES, *[_INTEGER] * 8, *[_INT32] * 3, _INT64, _INT64
    ],
    "cce_relabel_leveled": [*_COLUMN_TYPES, _CODES, *[_INTEGER] * 6],
}  # fmt: skip
"""What each kernel takes, as _native.cpp declares it; tensors whose values it reads as stated."""
_LIBRARY = (Path(__file__).parent, tuple(_KERNELS))


def available() -> bool:
    """Whether the compiled kernels were built and load."""
    return compiled.library(*_LIBRARY) is not None


@functools.cache
def kernels() -> ctypes.CDLL:
    """The compiled functions.

    Raises:
        RuntimeError: they were not built.
    """
    found = compiled.loaded(*_LIBRARY)
    for name, types in _KERNELS.items():
        kernel = getattr(found, name)
        kernel.argtypes, kernel.restype = types, None
    found.cce_relabel_leveled.restype = _INTEGER  # ctypes would take it for 32 bits
    return found


def _one_per(rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(len(rows), dtype=torch.int32)


@compiled.operator(
    "nearest_sums(Tensor main_scores, Tensor helper_scores, Tensor a, Tensor b) -> Tensor",
    fake=lambda p, q, a, b: _one_per(a),
)
def _nearest_sums(*args: torch.Tensor) -> torch.Tensor:
    p, q, a, b = args
    out, cursor = _one_per(a), a.new_empty(len(p) + 1, dtype=torch.int64)
    sizes = (p.shape[1], len(p), len(q))
    kernels().cce_nearest_sums(p, q, *sizes, a, b, len(a), cursor, out)
    return out


@compiled.operator(
    "nearest_vectors(Tensor x, Tensor panels, Tensor half_norms) -> Tensor",
    fake=lambda x, *centroids: _one_per(x),
)
def _nearest_vectors(
    x: torch.Tensor, panels: torch.Tensor, half_norms: torch.Tensor
) -> torch.Tensor:
    return _nearest_points((x, None, None, None, None, 1.0), panels, half_norms, _one_per(x))


@compiled.operator(
    "nearest_pairs(Tensor main, Tensor helper, Tensor a, Tensor b, float unit, Tensor panels, "
    "Tensor half_norms) -> Tensor",
    fake=lambda main, helper, a, *rest: _one_per(a),
)
def _nearest_pairs(*args: Any) -> torch.Tensor:
    main, helper, a, b, unit, panels, half_norms = args
    return _nearest_points((None, main, helper, a, b, unit), panels, half_norms, _one_per(a))


def _nearest_points(
    points: tuple[torch.Tensor | float | None, ...],
    panels: torch.Tensor,
    half_norms: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    dim = panels.shape[1]
    # Room for the eight points that the AVX-512 form takes at once.
    shape, scratch = (len(half_norms), dim, len(out)), panels.new_empty(8 * dim)
    kernels().cce_nearest_points(*points, panels, half_norms, *shape, scratch, out)
    return out


class PairScorer:
    """Nearest of k centroids to main[a] + helper[b], by sums of two scores.

    With P = M C^T - |C|^2 / 2 and Q = H C^T, centroid c scores P[a, c] + Q[b, c]: the width of
    the vectors no longer counts. P and Q are allocated once, float32 [rows, k], k padded.
    """

    def __init__(self, main: torch.Tensor, helper: torch.Tensor, k: int) -> None:
        self._main, self._helper = main, helper
        # Few centroids are compared vector by vector, more of them by groups.
        multiple = LANES if k <= GROUP else GROUP
        width = -(-k // multiple) * multiple
        scores = main.new_zeros(len(main) + len(helper), width)
        scores[: len(main), k:] = LOWEST  # in one of both: what is added to it does not matter
        self._scores = scores.split([len(main), len(helper)])
        self._p, self._q = (part[:, :k] for part in self._scores)

    def score(self, centroids: torch.Tensor) -> None:
        """Makes P and Q of `centroids` [k, s]."""
        half_norms = (centroids * centroids).sum(1).mul_(-0.5)
        # In place: by default the tables of scores take up to 256 MiB.
        torch.addmm(half_norms, self._main, centroids.t(), out=self._p)
        torch.mm(self._helper, centroids.t(), out=self._q)

    def nearest(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Of the centroids scored last; a, b int32 [n], sorted by (a, b); result int32 [n]."""
        return _nearest_sums(*self._scores, a, b)


class PointScorer:
    """Nearest of `centroids` [k, s] by direct products, int32 [n]."""

    def __init__(self, centroids: torch.Tensor) -> None:
        k, dim = centroids.shape
        padded = centroids.new_zeros(-(-k // GROUP) * GROUP, dim)
        padded[:k] = centroids
        half_norms = centroids.new_full((len(padded),), LOWEST)
        half_norms[:k] = -0.5 * (centroids * centroids).sum(1)
        # By coordinate, so that one coordinate of 16 centroids is one vector.
        panels = padded.view(-1, PANEL, dim).transpose(1, 2).contiguous()
        self._centroids = (panels, half_norms)

    def of_vectors(self, x: torch.Tensor) -> torch.Tensor:
        """Of the rows of x, float32 [n, s]."""
        return _nearest_vectors(x.contiguous(), *self._centroids)

    def of_sums(self, points: Sources, scale: float) -> torch.Tensor:
        """Of (main[a] + helper[b]) / scale."""
        return _nearest_pairs(*points.tensors, 1 / scale, *self._centroids)


@compiled.operator(
    "accumulate(Tensor main, Tensor helper, Tensor a, Tensor b, Tensor weights, Tensor nearest, "
    "Tensor centroids, float unit, float error_scale, Tensor(a!) sums, Tensor(b!) sizes, "
    "Tensor(c!) errors) -> ()",
    fake=compiled.writes_only,
)
def _accumulate(main: torch.Tensor, helper: torch.Tensor, a: torch.Tensor, *rest: Any) -> None:
    b, weights, nearest, *others = rest
    points = (main, helper, main.shape[1], a, b, weights, nearest, len(a))
    kernels().cce_accumulate(*points, *others)


def accumulate(
    points: Sources,
    *,
    weights: torch.Tensor,
    nearest: torch.Tensor,
    centroids: torch.Tensor,
    scale: float,
    error_scale: float,
    stats: Sums,
) -> None:
    """Adds pairs, with their int64 weights, to the sums, sizes and errors of their clusters."""
    centers = centroids.double()
    _accumulate(*points.tensors, weights, nearest, centers, 1.0 / scale, error_scale, *stats)


def _column(
    codes: torch.Tensor, counts: torch.Tensor | None, *where: int
) -> tuple[ctypes.Array[ctypes.c_int64], int, int]:
    """Ids [first, last) of a column of packed codes, as the kernels take them."""
    bits, column, base, first, last = where
    fields = [*compiled.packed_codes(codes, bits), column, base]
    fields += [0, 1] if counts is None else [_BYTES.address(counts), LEVELS]
    return (ctypes.c_int64 * len(fields))(*fields), first, last


_COLUMN = "Tensor? levels, int bits, int column, int base, int first, int last"


@compiled.operator(
    f"count_pairs(Tensor codes, {_COLUMN}, int multiplier, int addend, int num_helper, "
    "Tensor? weights, Tensor(a!) counts) -> ()",
    fake=compiled.writes_only,
)
def _count_pairs(codes: torch.Tensor, *args: Any) -> None:
    kernels().cce_count_pairs_leveled(*_column(codes, *args[:6]), *args[6:])


@compiled.operator(
    f"residuals(Tensor codes, {_COLUMN}, Tensor new_codes, bool by_pair, int old_multiplier, "
    "int old_addend, int new_multiplier, int new_addend, Tensor main, Tensor helper, "
    "Tensor centroids, Tensor(a!) sums, Tensor(b!) sizes) -> ()",
    fake=compiled.writes_only,
)
def _residuals(codes: torch.Tensor, *args: Any) -> None:
    new_codes, main, sizes = args[6], args[12], args[16]
    shape = (len(sizes), main.shape[1])
    width = new_codes.element_size()
    column = _column(codes, *args[:6])
    kernels().cce_residuals_leveled(*column, new_codes, width, *args[7:12], *shape, *args[12:])


@compiled.operator(
    f"relabel(Tensor(a!) codes, {_COLUMN}, Tensor new_codes, bool by_pair, int multiplier, "
    "int addend, int num_helper, bool write) -> Tensor",
    fake=lambda codes, *rest: codes.new_empty((), dtype=torch.int64),
)
def _relabel(codes: torch.Tensor, *args: Any) -> torch.Tensor:
    new_codes, column = args[6], _column(codes, *args[:6])
    width = new_codes.element_size()
    changed = kernels().cce_relabel_leveled(*column, new_codes, width, *args[7:])
    return torch.tensor(changed, device="cpu")  # whatever a job has set as default device


@dataclass(frozen=True, kw_only=True)
class Column:
    """Ids [first, last) of one chunk: a column of packed `codes`, which begin at id `base`."""

    codes: torch.Tensor
    packing: CodePacking
    column: int
    first: int
    last: int
    base: int = 0
    counts: torch.Tensor | None = None
    """Of the ids from `base` on; see codes/counts.py."""

    @property
    def _args(self) -> tuple[Any, ...]:
        codes = self.codes
        # The kernels read by address, and would read beyond the end without a word.
        assert self.base <= self.first
        assert self.packing.rows(self.last - self.base) <= len(codes)
        return codes, self.counts, self.packing.bits, self.column, self.base, self.first, self.last

    def count_pairs(
        self,
        hash_: HashFunction,
        num_helper: int,
        weights: torch.Tensor | None,
        counts: torch.Tensor,
    ) -> None:
        """Adds the ids, or their int64 `weights`, to their pairs in `counts` int64 [k * k']."""
        hashed = (hash_.multiplier, hash_.addend, num_helper)
        _count_pairs(*self._args, *hashed, weights, counts)

    def residuals(
        self,
        new_codes: torch.Tensor,
        by_pair: bool,
        hashes: tuple[HashFunction, HashFunction],
        books: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        stats: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Adds x_i - new centroid to (sums [k', s], sizes [k']) of the ids' new helper rows.

        `new_codes`: of every pair, or of these ids; `hashes`: old and new; `books`: main, helper
        and centroids, int32.
        """
        old, new = hashes
        hashed = (old.multiplier, old.addend, new.multiplier, new.addend)
        _residuals(*self._args, new_codes, by_pair, *hashed, *books, *stats)

    def relabel(
        self,
        new_codes: torch.Tensor,
        by_pair: bool,
        hash_: HashFunction,
        num_helper: int,
        write: bool,
    ) -> int:
        """Number of ids whose code is another one; writes the new codes if `write`."""
        hashed = (hash_.multiplier, hash_.addend, num_helper)
        return int(_relabel(*self._args, new_codes, by_pair, *hashed, write))
