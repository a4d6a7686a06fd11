"""The top of a page: the state of runs, and their figures at a glance."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cce_torchrec.report.grids import grid
from cce_torchrec.report.html import Html, tag
from cce_torchrec.report.numbers import duration, number, percent, short, size, whole
from cce_torchrec.report.runs import Run

_WORDS = {
    "finished": "finished",
    "failed": "failed",
    "running": "running",
    "unknown": "not known",
}


def states(runs: Sequence[Run]) -> list[Html]:
    """What a reader has to know before all else, by run: that it failed, or goes on."""
    out = []
    for run in runs:
        sentences = [_state(run), *run.notes]
        if run.state == "finished" and not run.notes:
            continue
        texts = [tag("p", text) for text in sentences if text]
        who = tag("b", f"{run.name}: " if len(runs) > 1 else "", _WORDS[run.state])
        out.append(tag("div", who, texts, class_=f"state {run.state}", role="status"))
    return out


def _state(run: Run) -> str:
    """In a sentence, what state a run that is not finished is in."""
    last = max(
        (n for kind in run.lines for n in [run.last(kind, "step")] if n is not None), default=None
    )
    where = "before its first line" if last is None else f"after step {whole(last)}"
    if run.state == "failed":
        error = run.info.get("error")
        why = f": {error}" if isinstance(error, str) and error else " and does not say why."
        return f"This run failed {where}{why}"
    if run.state == "running":
        started = number(run.info.get("started"))
        since = "" if started is None else f" since {_date(started)}"
        return (
            f"By run.json this run is training{since}; its last line was written {where}. A run "
            "that was killed says the same. The page shows what there is so far."
        )
    if run.state == "unknown":
        return (
            f"There is neither run.json nor summary.json: this run goes on, was killed {where}, or "
            "is of an older version. The page shows what there is."
        )
    return ""


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):  # no year that there is
        return "an unknown time"


def _best(run: Run, validation: str, of_epochs: str, best: Callable[..., float]) -> float | None:
    found = [y for _, y in run.points("validation", validation) + run.points("epoch", of_epochs)]
    return best(found) if found else run.figure(f"best_{of_epochs}")


def _log_loss(run: Run) -> float | None:
    return _best(run, "log_loss", "val_log_loss", min)


def _auc(run: Run) -> float | None:
    return _best(run, "auc", "val_auc", max)


def _clusterings(run: Run) -> float | None:
    # Older runs do not say.
    return float(len(run.of("clustering"))) if run.of("train") or run.of("clustering") else None


def _ranks(run: Run) -> float | None:
    return run.figure("world_size")


def _seconds(run: Run) -> float | None:
    started, ended = number(run.info.get("started")), number(run.info.get("ended"))
    if started is not None and ended is not None:
        return ended - started
    return run.last("train", "seconds") or run.figure("seconds")


def _table_bytes(run: Run) -> float | None:
    found = [number(t.get(n)) for t in run.tables for n in ("codebook_bytes", "code_bytes")]
    known = [n for n in found if n is not None]
    return sum(known) if known else run.figure("table_bytes")


def _full_bytes(run: Run) -> float | None:
    known = [n for t in run.tables if (n := number(t.get("full_bytes"))) is not None]
    if known:
        return sum(known)
    taken, ratio = run.figure("table_bytes"), run.figure("compression_ratio")
    return None if taken is None or ratio is None else taken * ratio


def _throughput(run: Run) -> float | None:
    """Mean over the lines, by the seconds that each took."""
    lines = [
        (examples, rate)
        for line in run.of("train")
        if (examples := number(line.get("examples")))
        and (rate := number(line.get("examples_per_second")))
    ]
    # Not the mean of rates, in which short lines would count as much as long ones.
    seconds = sum(examples / rate for examples, rate in lines)
    return sum(e for e, _ in lines) / seconds if seconds else run.figure("examples_per_second")


def _clustering_seconds(run: Run) -> float | None:
    known = [n for c in run.of("clustering") if (n := number(c.get("seconds"))) is not None]
    return sum(known) if known else run.figure("clustering_seconds")


def _steps(run: Run) -> float | None:
    found = [run.last(kind, "step") for kind in ("train", "validation", "clustering")]
    return max((n for n in found if n is not None), default=None)


def _share(run: Run) -> float | None:
    taken, full = _table_bytes(run), _full_bytes(run)
    return taken / full if taken is not None and full else None


_Figure = tuple[str, Callable[[Run], float | None], Callable[[float], str], int]
_FIGURES: tuple[_Figure, ...] = (
    ("best validation log loss", _log_loss, "{:.4f}".format, -1),
    ("best validation AUC", _auc, "{:.4f}".format, 1),
    ("bytes of tables", _table_bytes, size, -1),
    ("of full tables", _share, percent, -1),
    ("examples per second", _throughput, short, 0),
    ("time", _seconds, duration, 0),
    ("of it clustering", _clustering_seconds, duration, 0),
    ("clusterings", _clusterings, whole, 0),
    ("steps", _steps, whole, 0),
    ("ranks", _ranks, whole, 0),
)  # fmt: skip
"""Name, value, form, and whether less (-1) or more (1) of it is better; 0: no best is marked, as of
speeds, which differ from run to run by themselves."""


def glance(runs: Sequence[Run]) -> Html:
    """The figures of runs: of one as tiles, of several side by side, with the best in bold."""
    found = [(name, [of(run) for run in runs], form, better) for name, of, form, better in _FIGURES]
    found = [row for row in found if any(value is not None for value in row[1])]
    if len(runs) == 1:
        return tag(
            "dl", [_tile(name, values[0], form) for name, values, form, _ in found], class_="tiles"
        )
    body = [
        [name, *(_cell(value, values, form, better) for value in values)]
        for name, values, form, better in found
    ]
    state = [
        "state",
        *(tag("span", _WORDS[run.state], class_=f"badge {run.state}") for run in runs),
    ]
    return grid(["", *(_key(place, run) for place, run in enumerate(runs))], [state, *body], left=1)


def _tile(name: str, value: float | None, form: Callable[[float], str]) -> Html:
    return tag("div", tag("dt", name), tag("dd", "-" if value is None else form(value)))


def _key(place: int, run: Run) -> Html:
    return tag("span", tag("span", class_=f"key solid c{place % 8}"), run.name)


def _cell(
    value: float | None, values: Sequence[float | None], form: Callable[[float], str], better: int
) -> Html:
    if value is None:
        return tag("span", "-")
    # Equal ones are all best, which tells nothing.
    known = [one for one in values if one is not None]
    best = better and len(set(known)) > 1 and value == (max if better > 0 else min)(known)
    return tag("strong" if best else "span", form(value))
