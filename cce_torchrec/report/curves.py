"""Charts of what was measured step by step: loss, AUC, throughput, rates, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cce_torchrec.report.charts import Line, Mark, Point, line_chart
from cce_torchrec.report.html import Html, tag
from cce_torchrec.report.numbers import number, short, size, whole
from cce_torchrec.report.runs import Run

_MOST_RATES = 6
_MOST_RANKS = 4
"""Ranks whose memory is drawn one by one; of more, the one that has most."""


def clustering_marks(runs: Sequence[Run]) -> list[Mark]:
    """Where the clusterings of runs were; in their colours where there are several runs."""
    return [
        Mark(
            x=step,
            label=f"{_of(run, runs)}clustering after step {whole(step)}",
            color=place if len(runs) > 1 else None,
        )
        for place, run in enumerate(runs)
        for line in run.of("clustering")
        if (step := number(line.get("step"))) is not None
    ]


def quality(runs: Sequence[Run]) -> list[Html]:
    """Loss and AUC by step, with marks where clusterings were."""
    return [
        _trained_and_validated("Log loss", runs, "loss", "log_loss", "train_loss", "val_log_loss"),
        _trained_and_validated("AUC", runs, "auc", "auc", "", "val_auc"),
    ]


def _trained_and_validated(
    title: str, runs: Sequence[Run], trained: str, validated: str, *of_epochs: str
) -> Html:
    """A chart of one figure while training and in validation."""
    alone, lines = len(runs) == 1, []
    steps = True
    for place, run in enumerate(runs):
        train, validation = run.points("train", trained), run.points("validation", validated)
        # Older runs have a line an epoch, and nothing in between.
        if not train and not validation:
            train, validation = (run.points("epoch", name) for name in of_epochs)
            steps = run.figure("steps_per_epoch") is not None
        # Faint, as single steps scatter.
        name = "training" if alone else f"{run.name}, training"
        lines.append(Line(name=name, points=train, color=place, style="faint"))
        name = "validation" if alone else f"{run.name}, validation"
        color = 1 if alone else place
        lines.append(Line(name=name, points=validation, color=color, dots=True))
    marks = clustering_marks(runs) if steps else []
    note = "Vertical lines: clusterings." if marks else ""
    chart = line_chart(
        title,
        lines,
        marks=marks,
        note=note,
        format=_four,
        late=True,
        x_label="step" if steps else "epoch",
    )
    return _or_nothing(chart, title)


def speed(runs: Sequence[Run]) -> list[Html]:
    """Throughput, learning rates and memory."""
    return [
        _throughput(runs),
        _or_nothing(line_chart("Learning rates", _rates(runs)), "Learning rates"),
        _or_nothing(line_chart("Memory", _memory(runs), format=size, unit=size), "Memory"),
    ]


def _throughput(runs: Sequence[Run]) -> Html:
    title = "Examples per second"
    lines = [
        Line(
            name=title if len(runs) == 1 else run.name,
            points=run.points("train", "examples_per_second"),
            color=place,
        )
        for place, run in enumerate(runs)
    ]
    chart = line_chart(title, lines, from_zero=True, format=whole, note="Of all ranks together.")
    return _or_nothing(chart, title)


def _rates(runs: Sequence[Run]) -> list[Line]:
    out = []
    for place, run in enumerate(runs):
        names = dict.fromkeys(
            name
            for line in run.of("train")
            if isinstance(line.get("rates"), dict)
            for name in line["rates"]
        )
        for other, name in enumerate(list(names)[:_MOST_RATES]):
            values = ((line, _in(line.get("rates"), name)) for line in run.of("train"))
            out.append(
                Line(
                    name=f"{_of(run, runs)}{name}",
                    points=_with_steps(values),
                    color=place if len(runs) > 1 else other,
                    style=("solid", "dashed", "dotted")[other % 3],
                )
            )
    return out


def _in(found: object, name: str) -> object:
    return found.get(name) if isinstance(found, dict) else None


def _memory(runs: Sequence[Run]) -> list[Line]:
    out = []
    for place, run in enumerate(runs):
        lines = [line for line in run.of("train") if isinstance(line.get("memory"), list)]
        ranks = max((len(line["memory"]) for line in lines), default=0)
        # The rank that has most is the one that runs out of it.
        if len(runs) > 1 or ranks > _MOST_RANKS:
            most = (
                (line, max(filter(None, map(number, line["memory"])), default=None))
                for line in lines
            )
            name = run.name if len(runs) > 1 else f"the rank of {ranks} that has most"
            out.append(Line(name=name, points=_with_steps(most), color=place))
            continue
        for rank in range(ranks):
            own = ((line, line["memory"][rank]) for line in lines if len(line["memory"]) > rank)
            out.append(Line(name=f"rank {rank}", points=_with_steps(own), color=rank))
    return out


def _with_steps(values: Iterable[tuple[dict[str, object], object]]) -> list[Point]:
    """Step and value of the lines that have both."""
    found = ((number(line.get("step")), number(value)) for line, value in values)
    return [(step, value) for step, value in found if step is not None and value is not None]


def _of(run: Run, runs: Sequence[Run]) -> str:
    return "" if len(runs) == 1 else f"{run.name}, "


def _four(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else short(value)


def _or_nothing(chart: Html | None, title: str) -> Html:
    if chart is not None:
        return chart
    caption = tag("figcaption", tag("b", title))
    return tag("figure", caption, tag("p", "Nothing was measured.", class_="none"), class_="empty")
