"""Ways to find the nearest centroid of every point, chosen by name."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from cce_torchrec.gpu.usable import unusable, usable
from cce_torchrec.kmeans import native
from cce_torchrec.kmeans.ieee import ieee_float32
from cce_torchrec.kmeans.points import BLOCK, PairPoints, Points
from cce_torchrec.kmeans.sources import Sources

Nearest = Callable[[int, int], torch.Tensor]
"""Nearest centroid of points [start, end), int32; ties go to the lowest index."""

SCORE_BYTES = 1 << 28
"""Most that tables of scores may take; products with the points need none."""
SKLEARN_BACKENDS = ("sklearn", "sklearn-minibatch")
BACKENDS = ("auto", "native", "torch", "triton", "faiss", *SKLEARN_BACKENDS)


def optional_module(module: str, extra: str) -> Any:
    """Imports an optional dependency.

    Raises:
        ValueError: saying how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"this K-means backend needs {module}, which is not installed; "
            f"pip install 'cce-torchrec[{extra}]'"
        ) from error


class Backend(ABC):
    """A way to find nearest centroids, whose results do not depend on how points are cut up."""

    name: str

    @abstractmethod
    def prepare(self, points: Points, centroids: torch.Tensor) -> Nearest:
        """A function from a range of points to their nearest of `centroids` [k, s]."""


class BlockBackend(Backend):
    """Scores points in blocks at fixed positions, because the bits of a product depend on them."""

    def prepare(self, points: Points, centroids: torch.Tensor) -> Nearest:
        """See `Backend.prepare`."""
        block = self._block(points, centroids)

        def nearest(start: int, end: int) -> torch.Tensor:
            assert start % BLOCK == 0
            parts = [
                block(points.vectors(slice(first, min(first + BLOCK, end))))
                for first in range(start, end, BLOCK)
            ]
            return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)

        return nearest

    @abstractmethod
    def _block(
        self, points: Points, centroids: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function x [n, s] -> nearest centroid, int32 [n]."""


class TorchBackend(BlockBackend):
    """One product and one argmax per block, in IEEE float32; any device."""

    name = "torch"

    def prepare(self, points: Points, centroids: torch.Tensor) -> Nearest:
        """As `Backend.prepare`; what a job has set for its own products does not count."""
        nearest = super().prepare(points, centroids)

        def in_ieee(start: int, end: int) -> torch.Tensor:
            with ieee_float32(points.device):
                return nearest(start, end)

        return in_ieee

    def _block(
        self, points: Points, centroids: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        half_norms = -0.5 * (centroids * centroids).sum(1)
        # The temporary [rows, k] stays near 16 MiB on a CPU, 256 MiB elsewhere.
        most = (1 << 22 if points.device.type == "cpu" else 1 << 26) // len(centroids)
        rows = min(BLOCK, max(64, most))

        def block(x: torch.Tensor) -> torch.Tensor:
            out = torch.empty(len(x), dtype=torch.int32, device=x.device)
            for start in range(0, len(x), rows):
                part = x[start : start + rows]
                count = len(part)
                if count < rows:  # the bits of a product depend on its shape
                    part = torch.cat([part, part.new_zeros(rows - count, part.shape[1])])
                scores = torch.addmm(half_norms, part, centroids.t())
                out[start : start + count] = scores.argmax(1)[:count].int()
            return out

        return block


class NativeBackend(BlockBackend):
    """The compiled kernels: sums of two scores over pairs, direct products elsewhere."""

    name = "native"

    def __init__(self, score_bytes: int = SCORE_BYTES) -> None:
        if not native.available():
            raise ValueError(
                "the compiled K-means kernels were not built; install a C++ compiler and then "
                "this package again, or choose backend torch or faiss"
            )
        self._score_bytes = score_bytes
        self._held: tuple[PairPoints, int, native.PairScorer | None] | None = None

    def prepare(self, points: Points, centroids: torch.Tensor) -> Nearest:
        """See `Backend.prepare`."""
        if isinstance(points, PairPoints):
            a, b, main, helper = points.a, points.b, points.main, points.helper
            two_scores = self._pair_scorer(points, len(centroids))
            if two_scores is not None:
                two_scores.score(centroids)
                return lambda start, end: two_scores.nearest(a[start:end], b[start:end])
            direct = native.PointScorer(centroids)
            return lambda start, end: direct.of_sums(
                Sources(main, helper, a[start:end], b[start:end]), points.scale
            )
        return super().prepare(points, centroids)

    def _block(
        self, points: Points, centroids: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        return native.PointScorer(centroids).of_vectors

    def _pair_scorer(self, points: PairPoints, k: int) -> native.PairScorer | None:
        """The same one as long as `points` and `k` are the same; None where it does not pay."""
        if self._held is None or self._held[0] is not points or self._held[1] != k:
            pays = self._two_scores_pay(points, k)
            self._held = None  # frees its scores first
            made = native.PairScorer(*points.codebooks(), k) if pays else None
            self._held = (points, k, made)
        return self._held[2]

    def _two_scores_pay(self, points: PairPoints, k: int) -> bool:
        """Whether sums of two scores are cheaper than products with the points.

        Nanoseconds measured on AVX-512 cores: two scores cost the making of their tables, and per
        centroid two loads whatever the width, more where the main row's scores leave the cache
        before another pair of the row needs them; products rise with the width.
        """
        rows, n, dim = len(points.main) + len(points.helper), points.num_points, points.dim
        if score_table_bytes(len(points.main), len(points.helper), k) > self._score_bytes:
            return False
        repeats = n * max(8, native.TILE // (4 * k)) / (len(points.main) * len(points.helper))
        two_scores = 0.07 if k <= 1024 else 0.07 + 0.28 / max(1.0, repeats)
        return rows * k * (1.05 + 0.01 * dim) + n * k * two_scores < n * k * (0.03 + 0.019 * dim)


class FaissBackend(BlockBackend):
    """FAISS's exact search; on CUDA tensors its GPU form, where faiss-gpu is installed."""

    name = "faiss"
    _resources: ClassVar[dict[int, Any]] = {}
    """By device, for the life of the process: up to 1.5 GiB of scratch memory each, which would
    otherwise be allocated anew, with waits, in every iteration."""

    def __init__(self) -> None:
        self._faiss = optional_module("faiss", "faiss")

    def _block(
        self, points: Points, centroids: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        faiss = self._faiss
        if points.device.type == "cuda":
            return self._block_on_gpu(points.device, centroids)
        held = centroids.contiguous().numpy()
        return lambda x: torch.from_numpy(
            faiss.knn(x.contiguous().numpy(), held, 1)[1][:, 0].astype("int32")
        )

    def _block_on_gpu(
        self, device: torch.device, centroids: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        faiss = self._faiss
        if not hasattr(faiss, "StandardGpuResources"):
            raise ValueError(
                f"backend 'faiss' runs on {device} by faiss-gpu only, and faiss-cpu is installed; "
                "pip uninstall faiss-cpu, pip install 'cce-torchrec[faiss-gpu]', or choose backend "
                "triton or torch"
            )
        importlib.import_module("faiss.contrib.torch_utils")  # add and search take tensors then
        number = 0 if device.index is None else device.index
        if number not in self._resources:
            self._resources[number] = faiss.StandardGpuResources()
        config = faiss.GpuIndexFlatConfig()
        config.device = number
        # torch_utils orders FAISS's work by the current stream of torch's current device, so that
        # must be the index's.
        with torch.cuda.device(number):
            index = faiss.GpuIndexFlatL2(self._resources[number], centroids.shape[1], config)
            index.add(centroids.contiguous())

        def block(x: torch.Tensor) -> torch.Tensor:
            with torch.cuda.device(number):
                return index.search(x.contiguous(), 1)[1][:, 0].int()

        return block


class TritonBackend(Backend):
    """Tile kernels on CUDA: the exact winner, and no scores in memory."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        why = unusable(device)
        if why is not None:
            raise ValueError(f"backend 'triton': {why}; or choose backend 'torch'")

    def prepare(self, points: Points, centroids: torch.Tensor) -> Nearest:
        """See `Backend.prepare`."""
        from cce_torchrec.kmeans.triton_search import Search  # here: Triton may not be installed

        return Search(points, centroids).nearest


def score_table_bytes(num_rows: int, helper_rows: int, k: int) -> int:
    """Bytes of the scores of all main and helper rows for k centroids."""
    return 4 * (num_rows + helper_rows) * (k + native.GROUP)


def make_backend(name: str, device: torch.device, score_bytes: int = SCORE_BYTES) -> Backend:
    """The backend `name`; "auto" is native or FAISS (CPU), Triton (CUDA) or torch, what there is.

    Args:
        score_bytes: most that native's tables of scores may take.

    Raises:
        ValueError: an unknown name, or a missing optional dependency and how to install it.
    """
    if name == "auto":
        # Compiled kernels took a third to 1/145 of FAISS's time (at k=4096, s=4 they took 1.7 times
        # as long), and torch on a CPU is slower than FAISS.
        if device.type == "cpu" and native.available():
            return NativeBackend(score_bytes)
        if device.type == "cpu" and importlib.util.find_spec("faiss") is not None:
            return FaissBackend()
        return TritonBackend(device) if usable(device) else TorchBackend()
    made: dict[str, Callable[[], Backend]] = {
        "native": lambda: NativeBackend(score_bytes),
        "torch": TorchBackend,
        "faiss": FaissBackend,
        "triton": lambda: TritonBackend(device),
    }
    if name not in made:
        raise ValueError(f"unknown K-means backend {name!r}; choose one of {list(BACKENDS)}")
    if name == "native" and device.type != "cpu":
        raise ValueError(f"backend 'native' runs on the CPU, not on {device}; use torch or faiss")
    return made[name]()
