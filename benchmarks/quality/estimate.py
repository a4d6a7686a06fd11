"""How long what is missing would take, from the CPU seconds of finished cells."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.quality.cells import Group
from benchmarks.quality.running import remaining
from benchmarks.quality.store import Record


def estimate(
    groups: Sequence[Group], records: Mapping[str, Record], asked: Sequence[int], jobs: int
) -> str:
    """A Markdown table: cells that are missing, seconds of one, and hours on `jobs` idle cores.

    A method without a finished cell on a data set is taken to be as slow as the data set's mean.
    """
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records.values():
        if "cpu_seconds" in record:
            per_pass = record["cpu_seconds"] / record["passes"]
            seconds[record["dataset"], record["method"]].append(per_pass)
            seconds[record["dataset"], ""].append(per_pass)
    lines = ["| data set | cells missing | CPU s a cell | hours |", "| --- | --- | --- | --- |"]
    total = 0.0
    for dataset in dict.fromkeys(group.dataset for group in groups):
        mine = remaining(
            [group for group in groups if group.dataset == dataset], records, asked
        ).values()
        if not seconds[dataset, ""]:
            lines.append(f"| {dataset} | {len(mine):,} | no cell yet | ? |")
            continue
        costs = [
            group.passes * statistics.fmean(seconds[dataset, name])
            for group in mine
            for name in [group.method if seconds[dataset, group.method] else ""]
        ]
        hours = sum(costs) / 3600 / jobs
        total += hours
        a_cell = sum(costs) / max(1, len(costs))
        lines.append(f"| {dataset} | {len(costs):,} | {a_cell:.0f} | {hours:.1f} |")
    lines.append(f"| all that is known | | | {total:.1f} |")
    return "\n".join(lines)
