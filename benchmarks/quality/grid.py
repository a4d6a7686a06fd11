"""Which cells there are, and which of them are still to be computed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.quality.cells import Cell, Group
from benchmarks.quality.methods import METHODS, Method, Try
from benchmarks.quality.problems import PROBLEMS, Problem
from benchmarks.quality.store import Record

_FACTOR = 3
"""Between a rate at the edge of those that were tried and the further one."""


@dataclass(frozen=True)
class Selection:
    """What part of the grid is asked for."""

    datasets: Sequence[str] = tuple(PROBLEMS)
    methods: Sequence[str] = tuple(METHODS)
    budgets: Sequence[str] = ()
    """None means all of each data set."""
    splits: Sequence[int] = ()
    """None means those of each data set."""
    passes: Sequence[int] = ()
    """None means all of each data set."""


def groups(selection: Selection) -> list[Group]:
    """The groups of cells that `selection` asks for."""
    out = []
    for dataset in selection.datasets:
        problem = PROBLEMS[dataset]
        for passes, budget in _settings(problem):
            if selection.passes and passes not in selection.passes:
                continue
            for name in selection.methods:
                method = METHODS[name]
                if _asked(method, budget, selection):
                    out.append(group_of(dataset, passes, name, budget))
    return out


def group_of(dataset: str, passes: int, method: str, budget: str) -> Group:
    """The group, with the versions that its data set and its method have now."""
    version = f"{PROBLEMS[dataset].version}.{METHODS[method].version}"
    return Group(dataset, passes, method, version, budget)


def _settings(problem: Problem) -> Iterator[tuple[int, str]]:
    for passes in problem.passes:
        yield passes, "none"
        first = passes == problem.passes[0]
        for budget in problem.budgets if first else problem.other_budgets:
            yield passes, budget


def _asked(method: Method, budget: str, selection: Selection) -> bool:
    if method.any_budget == (budget == "none"):
        return False
    return not method.any_budget or not selection.budgets or budget in selection.budgets


def tuning_cells(group: Group, records: Mapping[str, Record]) -> list[Cell]:
    """The cells that choose the rate of `group`, before any edge is looked beyond."""
    return [run for cell in _candidates(group, records) for run in _runs(cell)]


def _candidates(group: Group, records: Mapping[str, Record]) -> list[Cell]:
    """A cell of the first split for tuning for every rate of every try."""
    return [_tuning(group, tried, rate) for tried in _tries(group, records) for rate in tried.rates]


def _runs(candidate: Cell) -> list[Cell]:
    """The same on every split for tuning."""
    return [candidate.on(split) for split in PROBLEMS[candidate.group.dataset].tuning_splits]


def _tuning(group: Group, tried: Try, rate: float) -> Cell:
    split = PROBLEMS[group.dataset].tuning_splits[0]
    return Cell(group, split, split, tried.optimizer, rate, tried.form)


def _form_group(group: Group) -> Group:
    """The group whose tuning chooses the form and the optimizer of `group`: itself, or another."""
    if len(_all_tries(group)) == 1:
        return group
    return replace(group, budget=PROBLEMS[group.dataset].form_budget(group.budget))


def _all_tries(group: Group) -> tuple[Try, ...]:
    problem = PROBLEMS[group.dataset]
    return METHODS[group.method].tries(problem.model, problem.dim)


def _tries(group: Group, records: Mapping[str, Record]) -> Sequence[Try]:
    """All where forms are chosen; elsewhere the best one there that fits the budget here."""
    tries, at = _all_tries(group), _form_group(group)
    if at == group:
        return tries
    cells = _tried(at, records)

    def loss(tried: Try) -> float:
        return min(
            _loss(c, records)
            for c in cells
            if (c.form, c.optimizer) == (tried.form, tried.optimizer)
        )

    best_first = sorted(tries, key=loss)
    fit = [t for t in best_first if not _reason(_tuning(group, t, t.rates[0]), records)]
    return (fit or best_first)[:1]


@dataclass(frozen=True)
class Choice:
    """The rate and the form of a group, by the splits for tuning."""

    cell: Cell
    """The best one."""
    at_edge: bool
    """Whether no further rate on its side was tried."""


def splits_of(group: Group, asked: Sequence[int]) -> Sequence[int]:
    """The splits that are reported of `group`."""
    return asked or PROBLEMS[group.dataset].splits


def missing(group: Group, records: Mapping[str, Record], asked: Sequence[int]) -> list[Cell]:
    """The cells of `group` that can be computed now; when they are, there may be more.

    First those that choose the form; then those of each rate in that form; then, if the best rate
    is the lowest or the highest, the one beyond it; then the reported splits at the best rate.
    """
    absent = _missing_tuning(group, records)
    if absent:
        return absent
    choice = chosen(group, records)
    if choice is None:
        return []
    finals = [choice.cell.on(split) for split in splits_of(group, asked)]
    return [cell for cell in finals if cell.key not in records]


def _missing_tuning(group: Group, records: Mapping[str, Record]) -> list[Cell]:
    at = _form_group(group)
    if at != group:
        absent = _missing_tuning(at, records)
        if absent:
            return absent
    absent = [cell for cell in tuning_cells(group, records) if cell.key not in records]
    beyond = None if absent else _beyond(group, records)
    if beyond is not None:
        absent = [cell for cell in _runs(beyond) if cell.key not in records]
    return absent


def tuned(group: Group, records: Mapping[str, Record]) -> bool:
    """Whether all that chooses the form and the rate of `group` is there."""
    return not _missing_tuning(group, records)


def unnamed(group: Group, records: Mapping[str, Record], asked: Sequence[int]) -> list[str]:
    """What is to be computed once `missing` is there, a line a cell; no rates beyond edges."""
    if tuned(group, records):
        return []
    out = [f"{group}, split {split}" for split in splits_of(group, asked)]
    at = _form_group(group)
    if at != group and not tuned(at, records):
        rates = max(len(tried.rates) for tried in _all_tries(group))
        splits = PROBLEMS[group.dataset].tuning_splits
        out += [f"{group}, rate {i}, split {split}" for i in range(rates) for split in splits]
    return out


def chosen(group: Group, records: Mapping[str, Record]) -> Choice | None:
    """The best rate of all that were tried on splits for tuning; None: no form fits the budget."""
    cells = [cell for cell in _tried(group, records) if not _reason(cell, records)]
    best = min(cells, key=lambda cell: _loss(cell, records), default=None)
    if best is None:
        return None
    beside = [c.rate for c in cells if (c.form, c.optimizer) == (best.form, best.optimizer)]
    return Choice(best, best.rate in (min(beside), max(beside)))


def _tried(group: Group, records: Mapping[str, Record]) -> list[Cell]:
    """The candidates, and the one beyond an edge once it is there."""
    cells, beyond = _candidates(group, records), _beyond(group, records)
    if beyond is not None and all(cell.key in records for cell in _runs(beyond)):
        cells.append(beyond)
    return cells


def why_unfit(group: Group, records: Mapping[str, Record]) -> str:
    """Why no form of the method that was tried fits the budget of `group`."""
    return next(r for cell in _candidates(group, records) if (r := _reason(cell, records)))


def _reason(tuned: Cell, records: Mapping[str, Record]) -> str:
    """Why the form of a cell of tuning does not fit its budget; or ""."""
    return records.get(tuned.key, {}).get("does_not_fit", "")


def _beyond(group: Group, records: Mapping[str, Record]) -> Cell | None:
    """The cell of one rate further, if the best of the first ones is at their edge."""
    best = min(_candidates(group, records), key=lambda cell: _loss(cell, records))
    if "log_loss" not in records.get(best.key, {}):
        return None
    for tried in _tries(group, records):
        if (tried.form, tried.optimizer) == (best.form, best.optimizer):
            if best.rate == max(tried.rates):
                return _tuning(group, tried, float(f"{best.rate * _FACTOR:.3g}"))
            if best.rate == min(tried.rates):
                return _tuning(group, tried, float(f"{best.rate / _FACTOR:.3g}"))
    return None


def _loss(candidate: Cell, records: Mapping[str, Record]) -> float:
    """The mean over the splits for tuning; infinite where one is no number, or not there."""
    losses = [records.get(cell.key, {}).get("log_loss") for cell in _runs(candidate)]
    finite = [loss for loss in losses if loss is not None]
    return statistics.fmean(finite) if len(finite) == len(losses) else math.inf
