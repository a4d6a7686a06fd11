"""Weighted points in fixed point: the small interface that Lloyd's loop runs over.

Coordinates are integers of a common power-of-two scale, so sums over any part of the points, in
any order and on any number of ranks, are exact and equal. (FAISS's `DatasetAssign` is the model:
one loop over many kinds of data, because only sums come back.)
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod

import torch

from cce_torchrec.gpu.usable import usable
from cce_torchrec.kmeans import native
from cce_torchrec.kmeans.gpu_blocks import points_at_once
from cce_torchrec.kmeans.sources import Sources, Sums

_FIXED_POINT_BITS = 28
MAX_INTEGER = 1 << (_FIXED_POINT_BITS + 1)
"""Of a coordinate in fixed point: two rows of 28 bits."""
MAX_WEIGHT = 1 << 33
"""Most that all weights may sum to: coordinates have 29 bits, sums of them 63."""
MAX_MAGNITUDE = 1e16
"""Of a coordinate: far beyond it scores leave float32, and no centroid is the nearest."""
BLOCK = 1 << 16
"""Points scored at once; a fixed cut, because the bits of a product depend on its shape."""


class Points(ABC):
    """`num_points` weighted points of `dim` coordinates."""

    num_points: int
    dim: int
    scale: float
    weights: torch.Tensor
    """int64 [num_points], at least 0."""

    @property
    def device(self) -> torch.device:
        """Where the points live."""
        return self.weights.device

    @abstractmethod
    def integers(self, at: slice | torch.Tensor) -> torch.Tensor:
        """Fixed-point coordinates of the points `at` (a range or indices), int64 [., dim]."""

    @abstractmethod
    def sources(self) -> Sources:
        """The same, for kernels."""

    @abstractmethod
    def starts(self, count: int) -> torch.Tensor:
        """Indices of up to `count` different points, drawn by hash; int64."""

    @abstractmethod
    def transformed(self, matrix: torch.Tensor) -> Points:
        """The same points times `matrix` [dim, dim] (float32), with their weights and starts."""

    def vectors(self, at: slice | torch.Tensor) -> torch.Tensor:
        """Coordinates of the points `at`, float32 [., dim]."""
        return (self.integers(at).double() / self.scale).float()

    def check_weights(self) -> None:
        """Raises ValueError if sums of the weighted coordinates could overflow."""
        total = float(self.weights.sum(dtype=torch.float64))
        if total > MAX_WEIGHT:
            raise ValueError(
                f"weights sum to {total:.3g}, more than {MAX_WEIGHT} (2^33), beyond which exact "
                "sums would overflow; divide them"
            )

    @functools.cached_property
    def error_scale(self) -> float:
        """The power of two at which summed squared distances still fit 62 bits."""
        reach = 2.0 ** (_FIXED_POINT_BITS + 2) / self.scale
        largest = float(self.weights.sum()) * self.dim * reach * reach
        return 2.0 ** (61 - math.ceil(math.log2(max(largest, 1e-300))))

    def accumulate(
        self,
        start: int,
        nearest: torch.Tensor,
        centroids: torch.Tensor,
        error_scale: float,
        stats: Sums,
    ) -> None:
        """Adds points from `start` on to their clusters' sums, sizes and errors (all int64)."""
        if usable(self.device):
            from cce_torchrec.kmeans import triton_sums  # here, as Triton may not be installed

            values = (1 / self.scale, error_scale)
            scales = torch.tensor(values, dtype=torch.float64, device=self.device)
            weights, sources = self.weights.contiguous(), self.sources()
            centers, size = centroids.contiguous(), points_at_once(self.dim)
            for begin in range(0, nearest.numel(), size):
                part, own = nearest[begin : begin + size], start + begin
                triton_sums.accumulate(
                    sources, own, weights=weights, nearest=part, centroids=centers,
                    scales=scales, stats=stats,
                )  # fmt: skip
            return
        sums, sizes, errors = stats
        for first in range(0, nearest.numel(), BLOCK):
            cluster = nearest[first : first + BLOCK].long()
            at = slice(start + first, start + first + len(cluster))
            x, weights = self.integers(at), self.weights[at]
            # Errors are integers too before they are added up: float32 sums of different numbers of
            # ranks were 2e-7 to 5e-7 apart.
            off = (x.double() / self.scale - centroids[cluster].double()).square().sum(1)
            sums.index_add_(0, cluster, x * weights[:, None])
            sizes.index_add_(0, cluster, weights)
            errors.index_add_(0, cluster, (off * error_scale).round().long() * weights)


def metric_root(metric: torch.Tensor, dim: int) -> torch.Tensor:
    """The symmetric root R of `metric`: |x R|^2 = x^T metric x; float32 [dim, dim].

    Raises:
        ValueError: not finite, symmetric, positive semi-definite and [dim, dim].
    """
    values = metric.double().cpu()
    if values.shape != (dim, dim) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"metric must be finite and [{dim}, {dim}]; got {tuple(values.shape)}")
    # eigh reads one triangle only; the mean of both does not depend on which.
    eigenvalues, vectors = torch.linalg.eigh((values + values.t()) / 2)
    tiny = 1e-6 * float(eigenvalues.abs().max())
    if not torch.allclose(values, values.t(), atol=tiny) or float(eigenvalues.min()) < -tiny:
        raise ValueError("metric must be symmetric and positive semi-definite")
    # Rounding makes some that are 0 a little negative.
    return ((vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.t()).float()


def check_finite(*parts: torch.Tensor) -> float:
    """The largest magnitude of `parts`.

    Raises:
        ValueError: if a value is NaN or infinite, or larger than `MAX_MAGNITUDE`.
    """
    if not all(bool(torch.isfinite(p).all()) for p in parts):
        raise ValueError("weights are not finite (NaN or infinite)")
    largest = max((float(p.abs().max()) for p in parts if p.numel()), default=0.0)
    if largest > MAX_MAGNITUDE:
        raise ValueError(f"weights reach {largest:.3g}, K-means takes at most {MAX_MAGNITUDE:g}")
    return largest


def fixed_point_scale(*parts: torch.Tensor) -> float:
    """The power of two that brings the largest magnitude of `parts` to at most 2^28.

    Raises:
        ValueError: what `check_finite` refuses.
    """
    return scale_of(check_finite(*parts))


def scale_of(largest: float) -> float:
    """The power of two that brings the magnitude `largest` to at most 2^28."""
    if largest == 0.0:
        return 1.0
    _, exponent = math.frexp(largest)
    return 2.0 ** (_FIXED_POINT_BITS - exponent)


class PairPoints(Points):
    """Points main[a] + helper[b] of a CCE chunk, each pair weighted by the ids that read it.

    Args:
        main: [k, s], any float type.
        helper: [k', s].
        a: int32 [P], sorted; with equal a, `b` int32 [P] rises.
        weights: int64 [P].
        starts: indices of points, in the order in which they would start as centroids.

    Raises:
        ValueError: if a codebook is not finite.
    """

    def __init__(
        self,
        main: torch.Tensor,
        helper: torch.Tensor,
        *,
        a: torch.Tensor,
        b: torch.Tensor,
        weights: torch.Tensor,
        starts: torch.Tensor,
    ) -> None:
        main, helper = main.double(), helper.double()
        scale = fixed_point_scale(main, helper)
        main, helper = ((book * scale).round().int() for book in (main, helper))
        self._fill(main, helper, scale, (a, b, weights, starts))

    def _fill(
        self,
        main: torch.Tensor,
        helper: torch.Tensor,
        scale: float,
        pairs: tuple[torch.Tensor, ...],
    ) -> None:
        self.main, self.helper, self.scale, self.dim = main, helper, scale, main.shape[1]
        self.a, self.b, self.weights, self._starts = pairs
        self.num_points = self.a.numel()

    @classmethod
    def from_integers(
        cls,
        main: torch.Tensor,
        helper: torch.Tensor,
        scale: float,
        *rest: torch.Tensor,
    ) -> PairPoints:
        """Points whose codebooks are fixed-point int32 already; `rest` is a, b, weights, starts."""
        out = cls.__new__(cls)  # nothing is checked, which would wait for a GPU
        out._fill(main.contiguous(), helper.contiguous(), scale, rest)
        return out

    def integers(self, at: slice | torch.Tensor) -> torch.Tensor:
        """Sums of the rows of both codebooks, int64 [., dim]."""
        # Rows have 28 bits, so that the sum of two still is an int32.
        return (self.main[self.a[at].long()] + self.helper[self.b[at].long()]).long()

    def sources(self) -> Sources:
        """Both codebooks, and the rows of each pair."""
        return Sources(self.main, self.helper, self.a.contiguous(), self.b.contiguous())

    def starts(self, count: int) -> torch.Tensor:
        """The first of those that were drawn for the pairs."""
        return self._starts[:count]

    def transformed(self, matrix: torch.Tensor) -> PairPoints:
        """The same pairs of rows times `matrix`."""
        main, helper = (book @ matrix for book in self.codebooks())
        pairs = {"a": self.a, "b": self.b, "weights": self.weights, "starts": self._starts}
        return PairPoints(main, helper, **pairs)

    def codebooks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Main and helper as the points have them, float32."""
        return tuple((t.double() / self.scale).float() for t in (self.main, self.helper))  # type: ignore[return-value]  # two in, two out

    def accumulate(
        self,
        start: int,
        nearest: torch.Tensor,
        centroids: torch.Tensor,
        error_scale: float,
        stats: Sums,
    ) -> None:
        """The same by the compiled kernel, where there is one for these points."""
        # The kernel adds up four coordinates at a time.
        if self.device.type != "cpu" or not native.available() or self.dim % 4:
            super().accumulate(start, nearest, centroids, error_scale, stats)
            return
        end = start + nearest.numel()
        native.accumulate(
            Sources(self.main, self.helper, self.a[start:end], self.b[start:end]),
            weights=self.weights[start:end].contiguous(),  # may be a single one, expanded
            nearest=nearest,
            centroids=centroids,
            scale=self.scale,
            error_scale=error_scale,
            stats=stats,
        )


class TensorPoints(Points):
    """The rows of a tensor [n, s], with optional int64 weights [n].

    Raises:
        ValueError: not a finite, non-empty matrix, or weights that do not fit it.
    """

    def __init__(self, points: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        if points.dim() != 2 or not points.numel() or not points.is_floating_point():
            raise ValueError(
                f"points must be a non-empty float matrix [n, s]; got {points.dtype} "
                f"{tuple(points.shape)}"
            )
        self.num_points, self.dim = points.shape
        if weights is None:
            weights = torch.ones(self.num_points, dtype=torch.int64, device=points.device)
        if weights.shape != (self.num_points,) or weights.is_floating_point():
            raise ValueError(
                f"weights must be integers [{self.num_points}]; got {weights.dtype} "
                f"{tuple(weights.shape)}"
            )
        if int(weights.min()) < 0 or int(weights.sum()) == 0:
            raise ValueError("weights must be at least 0, and one of them more")
        self.weights = weights.long()
        self.scale = fixed_point_scale(points)
        self._integers = (points.double() * self.scale).round().int().contiguous()

    def integers(self, at: slice | torch.Tensor) -> torch.Tensor:
        """The points themselves, int64 [., dim]."""
        return self._integers[at].long()

    def sources(self) -> Sources:
        """The points themselves."""
        return Sources(self._integers)

    def transformed(self, matrix: torch.Tensor) -> TensorPoints:
        """The points times `matrix`."""
        return TensorPoints(self.vectors(slice(None)) @ matrix, self.weights)

    def starts(self, count: int) -> torch.Tensor:
        """Points in an order that their number alone decides."""
        # On the CPU, so that points on any device start alike.
        generator = torch.Generator().manual_seed(self.num_points)
        order = torch.randperm(self.num_points, generator=generator, device="cpu").to(self.device)
        # More than are asked for, as equal ones count once; not all, as `unique` sorts them.
        order = order[self.weights[order] > 0][: max(4 * count, 1024)]
        # Different points only, the first occurrence of each, in the order of the draw.
        _, inverse = torch.unique(self._integers[order], dim=0, return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(order), device=self.device)
        first.scatter_reduce_(0, inverse, torch.arange(len(order), device=self.device), "amin")
        return order[first.sort().values][:count]
