"""What linear CKA costs beside its three products, and how much memory it takes."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.alignment.parts import Part, Record
from benchmarks.plots import ratio_plot
from cce_torchrec.alignment.linear import linear_cka
from cce_torchrec.alignment.moments import moments
from cce_torchrec.alignment.tables import BLOCK

_TURNS = 7
_GOAL = 1.3


@dataclass(frozen=True)
class CostCell:
    """Two tables of `ids` x 64 in float32, in blocks of the package's size."""

    ids: int
    norms: bool
    """Whether what debiased CKA needs is added up too."""

    @property
    def key(self) -> str:
        """Of the cell."""
        return f"cost|ids={self.ids}|dim=64|block={BLOCK}|norms={self.norms}|version=1"

    def measure(self) -> Record:
        """Both in turns: medians of CPU time on one thread and of the ratio, and memory."""
        g = torch.Generator().manual_seed(0)
        x, y = (torch.randn(self.ids, 64, generator=g) for _ in range(2))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ours = [_timed(lambda: linear_cka(moments(_blocks(x, y), norms=self.norms)))]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        peer = [_timed(lambda: _products(x, y))]
        for _ in range(_TURNS):
            ours.append(_timed(lambda: linear_cka(moments(_blocks(x, y), norms=self.norms))))
            peer.append(_timed(lambda: _products(x, y)))
        ratios = [own / other for own, other in zip(ours[1:], peer[1:], strict=True)]
        return {
            "ids": self.ids,
            "norms": self.norms,
            "cka_s": statistics.median(ours[1:]),
            "products_s": statistics.median(peer[1:]),
            "ratio": statistics.median(ratios),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "memory_mb": memory / 1024,
        }


def _blocks(x: torch.Tensor, y: torch.Tensor) -> zip[tuple[torch.Tensor, torch.Tensor]]:
    return zip(x.split(BLOCK), y.split(BLOCK), strict=True)


def _products(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """X'X, X'Y and Y'Y alone, in the same blocks and types."""
    sums = [torch.zeros(64, 64, dtype=torch.float64) for _ in range(3)]
    for a, b in _blocks(x, y):
        sums[0] += a.T @ a
        sums[1] += a.T @ b
        sums[2] += b.T @ b
    return sums


def _timed(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def _cells(quick: bool) -> list[CostCell]:
    sizes = (200_000,) if quick else (2_000_000, 10_000_000)
    return [CostCell(ids, norms) for ids in sizes for norms in (False, True)]


def _lines(records: Sequence[Record]) -> list[str]:
    out = [
        "| ids | sums | linear CKA, s | three products, s | ratio (lowest to highest turn) | MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in records:
        sums = "with those of debiased CKA" if one["norms"] else "of linear CKA"
        between = f"{min(one['ratios']):.2f} to {max(one['ratios']):.2f}"
        out.append(
            f"| {one['ids']:,} | {sums} | {one['cka_s']:.2f} | {one['products_s']:.2f} | "
            f"{one['ratio']:.2f} ({between}) | {one['memory_mb']:.0f} |"
        )
    return [*out, "", "Run this part by itself and with `--jobs 1`: other work changes the ratio."]


def _draw(records: Sequence[Record], file: Path) -> None:
    bars = [
        (
            f"{one['ids']:,}, {'debiased too' if one['norms'] else 'linear CKA'}",
            one["ratio"],
            None if one["norms"] else _GOAL,
        )
        for one in records
    ]
    ratio_plot(bars, "CPU time over that of the three products", file)


PART = Part(
    name="cost",
    title="Cost of linear CKA of two tables x 64, one thread",
    cells=_cells,
    lines=_lines,
    draw=_draw,
)
