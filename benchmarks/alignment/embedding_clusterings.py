"""Part `clusterings`: how far runs of other seeds agree before and after clusterings of CCE.

Beside CCE there are the same tables without their clusterings, CE whose hash is drawn anew at about
as many times, and a row for every id, all read after the same numbers of steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from benchmarks.alignment.embedding_measures import cka, of_pairs, over_runs, shown
from benchmarks.alignment.embedding_plot import Axes, Line, draw
from benchmarks.alignment.embedding_runs import Data, cell_of, counts_of
from benchmarks.alignment.embedding_watch import WatchedRun, clustering_steps, watched
from benchmarks.alignment.parts import Part, Record
from cce_torchrec.alignment import CodeCounts, adjusted_mutual_information

BUDGETS = {"flights": "bytes=420000", "ml-1m": "bytes=104000", "gowalla": "bytes=700000"}
RUNS = 4
CCE = "CCE, frequent recipe"
LABELS = {
    ("full", True): "full",
    ("CE restarted", True): "CE restarted",
    (CCE, False): "CCE, never clustered",
    (CCE, True): "CCE",
}


@dataclass(frozen=True)
class ClusteringsCell:
    """Runs of a method from independent seeds, compared at several times."""

    dataset: str
    method: str
    clusters: bool
    share: float = 1.0
    runs: int = RUNS

    @property
    def key(self) -> str:
        """See `Cell`."""
        return (
            f"clusterings|{self.dataset}|{self.method}|clusters={self.clusters}|"
            f"share={self.share:g}|runs={self.runs}|version=1"
        )

    def measure(self) -> Record:
        """See `Cell`."""
        budget = "none" if self.method == "full" else BUDGETS[self.dataset]
        data, runs = Data(share=self.share), []
        for number in range(self.runs):
            cell = cell_of(self.dataset, self.method, budget, number)
            run = WatchedRun(cell, data, number, clusters=self.clusters)
            run.train()
            runs.append(run)
        seen = {
            name: counts.nonzero()[:, 0] for name, counts in counts_of(self.dataset, data).items()
        }
        times: dict[str, Any] = {}
        for when in runs[0].snapshots:
            shots = [run.snapshots[when] for run in runs]
            vectors = [shot.vectors for shot in shots]
            times[when] = {
                "cka": {name: of_pairs(vectors, name, ids, cka) for name, ids in seen.items()},
                "codes": {
                    name: agreement_of_codes([shot.codes[name] for shot in shots])
                    for name in shots[0].codes
                },
            }
        steps = clustering_steps(runs[0])
        return {
            "on": self.dataset,
            "label": LABELS[self.method, self.clusters],
            "runs": self.runs,
            "steps": {str(number): step for step, number in watched(steps).items()},
            "last_step": runs[0].tables.steps,
            "log_loss": [round(min(point[1] for point in run.curve), 5) for run in runs],
            "times": times,
        }


def agreement_of_codes(codes: Sequence[torch.Tensor]) -> list[float]:
    """Adjusted mutual information of each pair of runs, the mean over chunks.

    Args:
        codes: of each run, [chunks, ids].
    """
    out = []
    rows = max(int(one.max()) for one in codes) + 1
    for first, second in combinations(codes, 2):
        found = []
        for one, other in zip(first, second, strict=True):
            counts = CodeCounts((rows, rows))
            counts.add(one, other)
            found.append(adjusted_mutual_information(counts))
        out.append(round(statistics.fmean(found), 4))
    return out


def _cells(quick: bool) -> list[ClusteringsCell]:
    if quick:
        return [ClusteringsCell("ml-1m", CCE, clusters, 0.1, 3) for clusters in (False, True)]
    return [ClusteringsCell(on, *how) for on in BUDGETS for how in LABELS]


def _columns(record: Record) -> list[str]:
    """The times of a row: start, before and after the first clustering and the last, end."""
    numbers = list(record["steps"])
    pairs = [f"{side} {n}" for n in (numbers[0], numbers[-1]) for side in ("before", "after")]
    return ["start", *pairs, "end"]


def at_time(record: Record, when: str, what: str, name: str) -> tuple[float, float] | None:
    """The mean over pairs of runs and half its interval; None: not measured, or no variance."""
    values = record["times"].get(when, {}).get(what, {}).get(name)
    if not values or None in values:
        return None
    return over_runs(values, record["runs"])


def change(record: Record, when: tuple[str, str], what: str, name: str) -> tuple[float, float]:
    """By how much the measure rises between two times, pair by pair, as `over_runs`."""
    earlier, later = (record["times"][one][what][name] for one in when)
    differences = [b - a for a, b in zip(earlier, later, strict=True)]
    return over_runs(differences, record["runs"])


def _table(records: Sequence[Record], what: str) -> list[str]:
    out = [
        "| data | method | table | start | before first | after first | before last | after last "
        "| end |",
        "| --- " * 9 + "|",
    ]
    for one in records:
        for name in one["times"]["start"][what]:
            found = [at_time(one, when, what, name) for when in _columns(one)]
            row = [one["on"], one["label"], name, *(shown(pair) if pair else "" for pair in found)]
            out.append(f"| {' | '.join(row)} |")
    return out


def _jumps(records: Sequence[Record]) -> list[str]:
    """What a clustering does at once, and what the training between two does, by intervals."""
    out = []
    for one in records:
        if one["label"] != "CCE":
            continue
        for name in one["times"]["start"]["cka"]:
            said = []
            for number in one["steps"]:
                when = f"before {number}", f"after {number}"
                pairs = [at_time(one, time, "cka", name) for time in when]
                if None not in pairs:
                    mean, half = change(one, when, "cka", name)
                    # Less than what is shown of it is no change, however certain.
                    bound = max(half, 0.0005)
                    verdict = "rises" if mean > bound else "falls" if mean < -bound else "no change"
                    said.append(f"{number}: {mean:+.3f} ± {half:.3f} ({verdict})")
            out.append(f"- {one['on']}, {name}: clustering {'; '.join(said)}.")
    return out


def _control(records: Sequence[Record]) -> list[str]:
    """CCE against the same tables without clusterings, at the end."""
    by = {(one["on"], one["label"]): one for one in records}
    out = []
    for on in dict.fromkeys(one["on"] for one in records):
        pair = by.get((on, "CCE")), by.get((on, "CCE, never clustered"))
        for name in pair[0]["times"]["end"]["cka"] if pair[0] else ():
            if pair[0] is None or pair[1] is None:
                continue
            found = [at_time(one, "end", "cka", name) for one in pair if one]
            if found[0] is None or found[1] is None:
                continue
            (mean, half), (other, other_half) = found[0], found[1]
            apart = abs(mean - other) > half + other_half
            chance = "at chance" if abs(other) <= other_half else "not at chance"
            out.append(
                f"- {on}, {name}: {shown(found[0])} with clusterings and {shown(found[1])} "
                f"without ({chance}); the intervals {'are apart' if apart else 'overlap'}."
            )
    return out


def _lines(records: Sequence[Record]) -> list[str]:
    return [
        "Debiased CKA of runs of independent seeds, over ids that training has seen, at times "
        "that are the same for all methods; ± half of a 95 % interval over "
        f"{', '.join(str(n) for n in sorted({one['runs'] for one in records}))} runs. It is 0 "
        "under independence.",
        "",
        *_table(records, "cka"),
        "",
        "Adjusted mutual information of codes, the mean over chunks, 0 under independence. A table "
        "`all` has the ids of all features.",
        "",
        *_table([one for one in records if one["label"].startswith("CCE")], "codes"),
        "",
        "What a clustering changes at once, in CKA:",
        "",
        *_jumps(records),
        "",
        "At the end of training:",
        "",
        *_control(records),
    ]


def _time(record: Record, when: str) -> float:
    if when in ("start", "end"):
        return 0.0 if when == "start" else 1.0
    return float(record["steps"][when.split()[1]] / record["last_step"])


def _draw(records: Sequence[Record], file: Path) -> None:
    panels = []
    for on in dict.fromkeys(one["on"] for one in records):
        own = [one for one in records if one["on"] == on]
        for name in own[0]["times"]["start"]["cka"]:
            lines = []
            for one in own:
                points = [
                    (_time(one, when), pair)
                    for when in one["times"]
                    if (pair := at_time(one, when, "cka", name)) is not None
                ]
                x, y = [time for time, _ in points], [mean for _, (mean, _) in points]
                lines.append(Line(one["label"], x, y, [half for _, (_, half) in points]))
            panels.append(Axes(f"{on}, {name}", "part of training", "debiased CKA", lines))
    draw(panels, file)


PART = Part(
    name="clusterings",
    title="Agreement of runs before and after clusterings",
    cells=_cells,
    lines=_lines,
    draw=_draw,
)
