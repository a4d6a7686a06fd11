"""Folders of runs as they are found: whole, still growing, cut off, or of older versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cce_torchrec.checkpoint.location import location
from cce_torchrec.report.numbers import number

Json = dict[str, Any]
_FILES = ("run.json", "metrics.jsonl", "summary.json", "health.json", "config.yaml")
"""One of these makes a folder a run's; docs/reading_runs.md says what is in them."""


@dataclass(kw_only=True)
class Run:
    """What one run has left."""

    path: str
    name: str
    """By which the page calls it; others on the page have other names."""
    info: Json = field(default_factory=dict)
    """run.json."""
    summary: Json = field(default_factory=dict)
    """summary.json."""
    health: Json = field(default_factory=dict)
    """health.json."""
    config: str = ""
    """config.yaml, as it is."""
    lines: dict[str, list[Json]] = field(default_factory=dict)
    """Those of metrics.jsonl by kind, in the order of their steps."""
    notes: list[str] = field(default_factory=list)
    """Sentences about what could not be read."""

    @property
    def state(self) -> str:
        """ "finished", "failed", "running" or "unknown"."""
        state = self.info.get("state")
        if state in ("finished", "failed", "running"):
            return str(state)
        return "finished" if self.summary else "unknown"

    @property
    def settings(self) -> Json:
        """Of the run, by name."""
        return next((s for s in self._both("settings") if isinstance(s, dict)), {})

    @property
    def versions(self) -> Json:
        """Of libraries, by name."""
        return next((s for s in self._both("versions") if isinstance(s, dict)), {})

    @property
    def tables(self) -> list[Json]:
        """As run.json has them."""
        found = self.info.get("tables")
        return [t for t in found if isinstance(t, dict)] if isinstance(found, list) else []

    @property
    def table_health(self) -> list[Json]:
        """As health.json has it."""
        found = self.health.get("tables")
        return [t for t in found if isinstance(t, dict)] if isinstance(found, list) else []

    def points(self, kind: str, name: str) -> list[tuple[float, float]]:
        """Step and value of the lines of a kind that have both."""
        found = ((number(line.get("step")), number(line.get(name))) for line in self.of(kind))
        return [(step, value) for step, value in found if step is not None and value is not None]

    def of(self, kind: str) -> list[Json]:
        """The lines of a kind."""
        return self.lines.get(kind, [])

    def last(self, kind: str, name: str) -> float | None:
        """The last number `name` in lines of a kind."""
        found = [v for line in self.of(kind) if (v := number(line.get(name))) is not None]
        return found[-1] if found else None

    def figure(self, name: str) -> float | None:
        """A number of run.json or summary.json."""
        return next((n for one in self._both(name) if (n := number(one)) is not None), None)

    def _both(self, name: str) -> list[Any]:
        return [self.info.get(name), self.summary.get(name)]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in `folders`, local ones or URIs of an object store, each under a name of its own.

    Raises:
        ValueError: a folder that is not there or is no run's, or no folder at all.
    """
    if not folders:
        raise ValueError("no run is given; give the folder of one, as --out of `train` named it")
    paths = [location(folder) for folder in folders]
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    whole = [str(path).rstrip("/").split("/") for path in paths]
    most = max(map(len, whole))
    for count in range(1, most + 1):
        names = [
            "/".join(parts[-count:]) or str(path) for parts, path in zip(whole, paths, strict=True)
        ]
        if len(set(names)) == len(names):
            return names
    # One run may well be given twice.
    return [f"{'/'.join(parts[-1:])} ({number})" for number, parts in enumerate(whole, 1)]


def _read(path: Path, name: str) -> Run:
    if not path.exists():
        raise ValueError(f"{path} is not there; give the folder of a run (--out of `train`)")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; give the folder of the run that it is in")
    there = [file for file in _FILES if (path / file).is_file()]
    if not there:
        raise ValueError(
            f"{path} is no run: it has none of {', '.join(_FILES)}; give a folder that --out of "
            "`train` named"
        )
    run = Run(path=str(path), name=name)
    run.info = _json(run, path / "run.json")
    run.summary = _json(run, path / "summary.json")
    run.health = _json(run, path / "health.json")
    run.config = _text(run, path / "config.yaml") or ""
    _read_metrics(run, path / "metrics.jsonl")
    return run


def _text(run: Run, file: Path) -> str | None:
    """The content of a file, None if there is none or it cannot be read."""
    try:
        return file.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return None
    except Exception as error:  # clients of object stores have errors that are no OSError
        run.notes.append(f"{file.name} cannot be read ({error}).")
        return None


def _json(run: Run, file: Path) -> Json:
    text = _text(run, file)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        run.notes.append(f"{file.name} is damaged ({error}) and left out.")
        return {}
    if not isinstance(found, dict):
        run.notes.append(f"{file.name} holds a {type(found).__name__} and is left out.")
        return {}
    return found


def _read_metrics(run: Run, file: Path) -> None:
    text = _text(run, file)
    if text is None:
        run.notes.append("There is no metrics.jsonl, and so there are no curves.")
        return
    lines = text.split("\n")
    bad = 0
    for place, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            # Lines of older runs have no kind: they are of whole epochs.
            kind = str(found.get("kind", "epoch"))
        except (ValueError, RecursionError, AttributeError):
            # A run that goes on, or was killed, may be in the middle of its last line.
            if place == len(lines) - 1:
                run.notes.append("The last line of metrics.jsonl is cut off and left out.")
            else:
                bad += 1
            continue
        run.lines.setdefault(kind, []).append(found)
    if bad:
        run.notes.append(f"{bad} lines of metrics.jsonl cannot be read and are left out.")
    if not run.lines and not bad:
        run.notes.append("metrics.jsonl is empty: nothing was measured yet.")
    for kind, own in run.lines.items():
        # A resumed run may have written some lines twice, and others late.
        run.lines[kind] = sorted(own, key=lambda one: number(one.get("step")) or 0.0)
    _give_steps(run)


def _give_steps(run: Run) -> None:
    """Lines of epochs that have no step get that of their epoch's end, or the epoch itself."""
    per_epoch = number(run.info.get("steps_per_epoch"))
    for line in run.of("epoch"):
        epoch = number(line.get("epoch"))
        if number(line.get("step")) is None and epoch is not None:
            line["step"] = epoch * (per_epoch or 1)
