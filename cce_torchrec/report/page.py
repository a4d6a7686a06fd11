"""The page about one run or several: everything in one file, which asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from cce_torchrec.checkpoint.location import location, make_folder, write_whole
from cce_torchrec.report.clusterings import clustering
from cce_torchrec.report.curves import quality, speed
from cce_torchrec.report.html import Html, joined, tag
from cce_torchrec.report.overview import glance, states
from cce_torchrec.report.runs import Run, read_runs
from cce_torchrec.report.settings import settings, versions
from cce_torchrec.report.style import SCRIPT, STYLE
from cce_torchrec.report.tables import bytes_of, usage_of


def write_report(runs: Sequence[str | Path], path: str | Path) -> Path:
    """Writes a page in HTML about runs, and returns where it is.

    The page needs no other file and no network. A run that failed or goes on has a page, too, that
    says so at its top.

    Args:
        runs: folders that --out of `train` named, local ones or URIs of an object store; several
            are compared.
        path: the file, which is replaced as a whole.

    Raises:
        ValueError: a folder is not there or is no run's, or the page cannot be written.
    """
    text = page(read_runs(runs))
    file = location(path)
    if file.is_dir():  # onto which nothing could be renamed
        raise ValueError(f"{file} is a folder, and cannot be written; give the name of a file")
    make_folder(file.parent)
    write_whole(file, text)
    return file


def page(runs: Sequence[Run]) -> str:
    """The page about runs."""
    names = [run.name for run in runs]
    title = f"Run {names[0]}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}"
    sections = [
        ("glance", "At a glance", [glance(runs)]),
        ("quality", "Loss and AUC", [_charts(quality(runs))]),
        ("clustering", "Clustering", clustering(runs)),
        ("speed", "Speed and memory", [_charts(speed(runs))]),
        ("tables", "Bytes of tables", bytes_of(runs)),
        ("usage", "Use of codes and rows", usage_of(runs)),
        ("settings", "Settings", settings(runs)),
        ("versions", "Versions", versions(runs)),
    ]
    # Pages of many tables are long.
    links = [tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in sections]
    body = [
        tag(
            "header",
            tag("h1", title),
            tag("p", _when(runs), class_="when"),
            states(runs),
            tag("nav", tag("ul", links), aria_label="sections"),
        ),
        tag("main", [_section(*one) for one in sections]),
        tag("div", id="tip", hidden=True),
    ]
    return _document(title, joined(body))


def _document(title: str, body: Html) -> str:
    # What a file of a run smuggled in, if escaping ever failed, would still not be run or loaded.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE)),
    ]
    whole = tag(
        "html", tag("head", head), tag("body", body, tag("script", Html(SCRIPT))), lang="en"
    )
    return f"<!doctype html>\n{whole}\n"


def _section(key: str, name: str, parts: Sequence[Html]) -> Html:
    return tag("section", tag("h2", name), parts, id=key)


def _charts(charts: Sequence[Html]) -> Html:
    return tag("div", charts, class_="charts")


def _when(runs: Sequence[Run]) -> str:
    paths = ", ".join(run.path for run in runs)
    return f"{paths} · page of {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"
