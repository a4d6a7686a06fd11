"""The parts of the benchmark, in the order in which they run."""

from __future__ import annotations

from benchmarks.alignment import cost
from benchmarks.alignment.parts import Part

PARTS: dict[str, Part] = {part.name: part for part in (cost.PART,)}
