"""The parts of the benchmark, in the order in which they run."""

from __future__ import annotations

from benchmarks.alignment import cost, embedding_sharing, embedding_tables
from benchmarks.alignment.parts import Part

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        cost.PART,
        embedding_tables.PART,
        embedding_sharing.PART,
    )
}
