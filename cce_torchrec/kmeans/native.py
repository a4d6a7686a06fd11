"""The compiled kernels (_native.cpp), where the package was installed with a C++ compiler.

They are optional: `available()` is False without them, and the same work then runs in torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cce_torchrec import compiled
from cce_torchrec.codes.hashing import HashFunction

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


def _library() -> ctypes.CDLL | None:
    return compiled.library(Path(__file__).parent, ("cce_nearest_sums",))


def available() -> bool:
    """Whether the compiled kernels were built and load."""
    return _library() is not None


def _call(function: str, *args: torch.Tensor | int | float | None) -> int:
    """Calls a kernel: tensors by pointer, int as int64, float as double."""
    library = _library()
    assert library is not None
    converted: list[Any] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            assert arg.device.type == "cpu"
            converted.append(ctypes.c_void_p(arg.data_ptr()))
        elif isinstance(arg, float):
            converted.append(ctypes.c_double(arg))
        else:
            converted.append(None if arg is None else ctypes.c_int64(arg))
    kernel = getattr(library, function)
    kernel.restype = ctypes.c_int64
    return int(kernel(*converted))


class PairScorer:
    """Nearest of k centroids to main[a] + helper[b], by sums of two scores.

    With P = M C^T - |C|^2 / 2 and Q = H C^T, centroid c scores P[a, c] + Q[b, c]: the width of
    the vectors no longer counts. P and Q are allocated once, float32 [rows, k], k padded.
    """

    def __init__(self, main: torch.Tensor, helper: torch.Tensor, k: int) -> None:
        self._main, self._helper = main, helper
        multiple = LANES if k <= GROUP else GROUP
        width = -(-k // multiple) * multiple
        scores = torch.zeros(len(main) + len(helper), width)
        scores[: len(main), k:] = LOWEST
        p, q = scores.split([len(main), len(helper)])
        self._p, self._q = p[:, :k], q[:, :k]
        self._args = (p, q, width, len(main), len(helper))
        self._cursor = torch.empty(len(main) + 1, dtype=torch.int64)

    def score(self, centroids: torch.Tensor) -> None:
        """Makes P and Q of `centroids` [k, s]."""
        half_norms = (centroids * centroids).sum(1).mul_(-0.5)
        torch.addmm(half_norms, self._main, centroids.t(), out=self._p)
        torch.mm(self._helper, centroids.t(), out=self._q)

    def nearest(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Of the centroids scored last; a, b int32 [n], sorted by (a, b); result int32 [n]."""
        out = torch.empty(len(a), dtype=torch.int32)
        _call("cce_nearest_sums", *self._args, a, b, len(a), self._cursor, out)
        return out


class PointScorer:
    """Nearest of `centroids` [k, s] by direct products, int32 [n]."""

    def __init__(self, centroids: torch.Tensor) -> None:
        k, dim = centroids.shape
        padded = torch.zeros(-(-k // GROUP) * GROUP, dim)
        padded[:k] = centroids
        half_norms = torch.full((len(padded),), LOWEST)
        half_norms[:k] = -0.5 * (centroids * centroids).sum(1)
        panels = padded.view(-1, PANEL, dim).transpose(1, 2).contiguous()
        self._centroids = (panels, half_norms, len(padded), dim)
        self._scratch = torch.empty(8 * dim)

    def of_vectors(self, x: torch.Tensor) -> torch.Tensor:
        """Of the rows of x, float32 [n, s]."""
        return self._run((x.contiguous(), None, None, None, None, 1.0), len(x))

    def of_sums(
        self,
        main: torch.Tensor,
        helper: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Of (main[a] + helper[b]) / scale, int32 codebooks; of main's rows without the others."""
        return self._run((None, main, helper, a, b, 1 / scale), len(main if a is None else a))

    def _run(self, points: tuple[torch.Tensor | float | None, ...], n: int) -> torch.Tensor:
        out = torch.empty(n, dtype=torch.int32)
        _call("cce_nearest_points", *points, *self._centroids, n, self._scratch, out)
        return out


def accumulate(
    main: torch.Tensor,
    helper: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    nearest: torch.Tensor,
    centroids: torch.Tensor,
    scale: float,
    error_scale: float,
    stats: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Adds pairs (a, b int32; weight int64) to (sums [k, s], sizes [k], errors [k]), int64."""
    a, b, weights = pairs
    _call(
        "cce_accumulate",
        main,
        helper,
        main.shape[1],
        a,
        b,
        weights,
        nearest,
        len(a),
        centroids.double(),
        1.0 / scale,
        error_scale,
        *stats,
    )


@dataclass(frozen=True, kw_only=True)
class Column:
    """Ids [first, last) of one chunk: their codes are a column of `codes`, from id `base` on."""

    codes: torch.Tensor
    column: int
    first: int
    last: int
    base: int = 0

    @property
    def _args(self) -> tuple[torch.Tensor | int, ...]:
        codes = self.codes
        assert codes.is_contiguous() and self.base <= self.first
        assert self.last - self.base <= len(codes)
        # Where id 0 would be, as the kernels count from there; they read from `first` on.
        at = self.column - self.base * codes.shape[1]
        start = codes.data_ptr() + at * codes.element_size()
        return start, codes.element_size(), codes.shape[1], self.first, self.last

    def count_pairs(
        self,
        hash_: HashFunction,
        num_helper: int,
        weights: torch.Tensor | None,
        counts: torch.Tensor,
    ) -> None:
        """Adds the ids, or their int64 `weights`, to their pairs in `counts` int64 [k * k']."""
        hashed = (hash_.multiplier, hash_.addend, num_helper)
        _call("cce_count_pairs", *self._args, *hashed, weights, counts)

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
        _call(
            "cce_residuals",
            *self._args,
            new_codes,
            int(by_pair),
            old.multiplier,
            old.addend,
            new.multiplier,
            new.addend,
            len(books[1]),
            books[0].shape[1],
            *books,
            *stats,
        )

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
        return _call("cce_relabel", *self._args, new_codes, int(by_pair), *hashed, int(write))
