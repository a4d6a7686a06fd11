"""The clustering step of a chunk: seconds, memory, and what torch and FAISS take for the same."""

from __future__ import annotations

import functools
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.gpu_parts.part import Part, free
from benchmarks.gpu_parts.rival import Rival, faiss_seconds, precision, timed
from benchmarks.gpu_parts.timing import wait
from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.clustering import ClusteringReport, cluster
from cce_torchrec.clustering.budget import SAMPLES_PER_CENTROID, ChunkShape, budget
from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.local_chunks import local_chunks
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.pairs import find_pairs
from cce_torchrec.kmeans.backends import make_backend

ITERATIONS = 6
CLUSTERINGS, CHUNKS, DAY = 18, 4, 86400
LONG = 10.0
"""Seconds of the rival beyond which it is extrapolated from a tenth of the ids."""


@dataclass(frozen=True)
class Shape:
    """A chunk of width `dim`, its ids, and the rows of its codebooks."""

    num_ids: int
    main_rows: int
    helper_rows: int
    dim: int
    judged: bool = False
    """Whether the goals are about it."""

    @property
    def name(self) -> str:
        """For the table."""
        return f"N={self.num_ids:.0e} k={self.main_rows} k'={self.helper_rows} s={self.dim}"


FULL = [
    Shape(10**8, 8192, 24576, 32, judged=True),
    Shape(10**7, 4096, 12288, 32),
    Shape(10**7, 1024, 3072, 16),
]
QUICK = [Shape(20_000, 64, 192, 16, judged=True)]
WAYS = {"samples": {"samples_per_centroid": SAMPLES_PER_CENTROID}, "all pairs": {}}


@dataclass(frozen=True)
class Run:
    """One clustering."""

    seconds: float
    report: ClusteringReport
    allocated: int | None
    """Most bytes beside the model, of torch's allocator."""
    centroids: torch.Tensor


def run(part: Part) -> None:
    """Shape by shape: ours in both ways, then the rivals, then the other backends."""
    for shape in QUICK if part.quick else FULL:
        for backend in ("auto", "triton", "torch") if part.on_gpu else ("auto",):
            with part.attempt(f"{shape.name}: warming up {backend}"):
                warm_up(part, shape, backend)
        ours: dict[str, Run] = {}
        for way in WAYS:
            with part.attempt(f"{shape.name}: {way}"):
                ours[way] = _ours(part, shape, way, "auto", 3)
        with part.attempt(f"{shape.name}: rivals"):
            _rivals(part, shape, ours)
        del ours
        others = {"triton", "torch"} if part.on_gpu else {"torch"}
        for backend in sorted(others - {make_backend("auto", part.device).name}):
            with part.attempt(f"{shape.name}: {backend}"):
                _ours(part, shape, "samples", backend, 1)


def warm_up(part: Part, shape: Shape, backend: str) -> None:
    """A small clustering of the same widths: compiles what is compiled."""
    small = replace(shape, num_ids=min(shape.num_ids, 10**6))
    for samples in (10, None):
        once(part, small, backend, samples_per_centroid=samples)


def build(shape: Shape, device: torch.device) -> CCEEmbeddingBagCollection:
    """A table of one chunk with a helper a third as large as main, as after some training."""
    config = CCEEmbeddingBagConfig(
        name="t",
        num_embeddings=shape.num_ids,
        embedding_dim=shape.dim,
        feature_names=["f"],
        num_chunks=1,
        num_rows=shape.main_rows,
        num_helper_rows=shape.helper_rows,
    )
    module = CCEEmbeddingBagCollection([config], device=device)
    weight = _state(module).weight
    g = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=g, device=device))
        weight[shape.main_rows :] *= 0.3
    return module


def _state(module: CCEEmbeddingBagCollection) -> ChunkState:
    ((_, state),) = local_chunks(module, None, Options())
    return state


def memory_limit(way: str, device: torch.device) -> int | None:
    """Enough for all pairs: most of what is free; for samples as it is by default."""
    if way == "samples" or device.type != "cuda":
        return None
    return int(0.8 * torch.cuda.mem_get_info(device)[0])


def once(part: Part, shape: Shape, backend: str, **options: Any) -> Run:
    """One clustering of a fresh table."""
    module = build(shape, part.device)
    free()
    wait(part.device)
    held = 0
    if part.on_gpu:
        torch.cuda.reset_peak_memory_stats(part.device)
        held = torch.cuda.memory_allocated(part.device)
    call = functools.partial(cluster, module, iterations=ITERATIONS, backend=backend, **options)
    took, report = timed(part.device, call)
    used = torch.cuda.max_memory_allocated(part.device) - held if part.on_gpu else None
    return Run(took, report, used, _state(module).weight[: shape.main_rows].clone())


def _ours(part: Part, shape: Shape, way: str, backend: str, repeats: int) -> Run:
    limit = memory_limit(way, part.device)
    runs: list[Run] = []
    while len(runs) < repeats and sum(r.seconds for r in runs) < LONG:
        runs.append(once(part, shape, backend, memory_limit=limit, **WAYS[way]))
    took = statistics.median(r.seconds for r in runs)
    last, (chunk,) = runs[-1], runs[-1].report.chunks
    computed = last.report.peak_bytes
    share = CLUSTERINGS * CHUNKS * took / DAY
    part.add(
        "seconds a clustering",
        {
            "chunk": shape.name,
            "ids seen": way,
            "backend": make_backend(backend, part.device).name,
            "by default": backend == "auto",
            "seconds": took,
            f"share of a day, {CLUSTERINGS} of {CHUNKS} chunks": share,
            "MB": last.allocated / 1e6 if last.allocated is not None else None,
            "MB computed": computed / 1e6,
            "objective, of the ids seen": chunk.objective_after / chunk.objective_before,
            "every run": [r.seconds for r in runs],
            "shape": asdict(shape),
            "iterations": ITERATIONS,
        },
    )
    if backend == "auto" and shape.judged:
        part.goal(f"clustering, {way}", took, 0.3, 0.1, unit="s")
        if last.allocated is not None:
            off = abs(last.allocated / computed - 1)
            part.goal(f"memory of a clustering, {way}: off by", off, 0.1, unit="of it")
    return replace(last, seconds=took)


def vectors(state: ChunkState, count: int) -> torch.Tensor:
    """Embeddings of the chunk's first `count` ids, float32 [count, s]."""
    ids, k = state.ids, state.codes.config.num_rows
    weight = state.weight.detach()
    out = torch.empty(count, weight.shape[1], device=weight.device)
    for first in range(0, count, 1 << 20):
        last = min(first + (1 << 20), count)
        keys = ids.keys(ids.range(first, last))
        out[first:last] = weight[keys // ids.helper_rows] + weight[k + keys % ids.helper_rows]
    return out


def start_of(state: ChunkState, shape: Shape) -> torch.Tensor:
    """Where ours starts from where it sees samples, [k, s]."""
    chunk = ChunkShape(
        num_ids=shape.num_ids,
        num_rows=shape.main_rows,
        helper_rows=shape.helper_rows,
        dim=shape.dim,
    )
    plan = budget(chunk, 1 << 33, samples_per_centroid=SAMPLES_PER_CENTROID)
    points = find_pairs(state, plan).points
    return points.vectors(points.starts(shape.main_rows))


def _rivals(part: Part, shape: Shape, ours: dict[str, Run]) -> None:
    state = _state(build(shape, part.device))
    start = start_of(state, shape)
    few = shape.num_ids // 10
    blocks = (256, 2048) if part.quick else (1 << 13, 1 << 15, 1 << 17)
    tenth = Rival(vectors(state, few))
    best: tuple[float, str] | None = None
    for name in ("float32", "TF32") if part.on_gpu else ("float32",):
        with precision(tf32=name == "TF32"):
            probed = tenth.choose_block(start, blocks)
            took, centroids = timed(part.device, tenth.kmeans, start, ITERATIONS)
            whole, extrapolated = 10 * took, 10 * took > LONG
            if not extrapolated:
                everyone = Rival(vectors(state, shape.num_ids), tenth.block)
                whole, _ = timed(part.device, everyone.kmeans, start, ITERATIONS)
                del everyone
        objective = tenth.objective(centroids)
        part.add(
            "rivals over all ids (vectors of ids made before, and not counted)",
            {
                "chunk": shape.name,
                "rival": f"torch, {name}",
                "seconds": whole,
                "extrapolated from a tenth": extrapolated,
                "ids a block": tenth.block,
                **_against(ours, whole),
                **_objectives(tenth, ours, objective),
                "blocks, seconds": {str(size): s for size, s in probed.items()},
                "iterations": ITERATIONS,
            },
        )
        if best is None or whole < best[0]:
            best = (whole, name)
    assert best is not None
    if shape.judged:
        for way, run_ in ours.items():
            what = f"torch's addmm and max ({best[1]}) over all ids / ours, {way}"
            part.goal(what, best[0] / run_.seconds, 10, at_least=True)
    took_faiss = faiss_seconds(tenth.x, start, ITERATIONS) if part.on_gpu else "no GPU"
    if isinstance(took_faiss, str):
        part.note(f"FAISS: {took_faiss}")
        return
    row = {"chunk": shape.name, "rival": "FAISS on the GPU", "seconds": 10 * took_faiss}
    row |= {"extrapolated from a tenth": True, "ids a block": None}
    part.add(
        "rivals over all ids (vectors of ids made before, and not counted)",
        {**row, **_against(ours, 10 * took_faiss), "iterations": ITERATIONS},
    )


def _against(ours: dict[str, Run], took: float) -> dict[str, float]:
    return {f"/ ours, {way}": took / run_.seconds for way, run_ in ours.items()}


def _objectives(tenth: Rival, ours: dict[str, Run], rival: float) -> dict[str, float]:
    """Ours over the rival's, both on the tenth of the ids that the rival learned from."""
    return {
        f"objective of ours over its, {way}": tenth.objective(run_.centroids) / rival
        for way, run_ in ours.items()
    }
