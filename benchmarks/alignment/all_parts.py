"""The parts of the benchmark, in the order in which they run."""

from __future__ import annotations

from benchmarks.alignment import (
    cost,
    embedding_clusterings,
    embedding_halves,
    embedding_harm,
    embedding_sharing,
    embedding_tables,
    linear_end,
    linear_grid,
    small_report,
)
from benchmarks.alignment.parts import Part

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        linear_grid.LINEAR,
        linear_end.LINEAR_END,
        *small_report.NETWORKS.values(),
        embedding_tables.PART,
        embedding_halves.PART,
        embedding_clusterings.PART,
        embedding_sharing.PART,
        embedding_harm.PART,
        cost.PART,
    )
}
