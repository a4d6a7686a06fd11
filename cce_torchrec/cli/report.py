"""`cce-torchrec report`: a page about runs."""

from __future__ import annotations

import click


@click.command(name="report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN ...]")
@click.option(
    "--out", metavar="FILE.html",
    help="The page; local or the URI of an object store.  [default: report.html in the first RUN]",
)  # fmt: skip
def command(runs: tuple[str, ...], out: str | None) -> None:
    """Write a page in HTML about one RUN, or several beside each other.

    A RUN is a folder that --out of `train` named; a local path or the URI of an object store. The
    page is one file that needs no network. A run that failed or still goes on has a page, too.
    """
    from cce_torchrec.report import write_report

    path = write_report(runs, out or f"{runs[0].rstrip('/')}/report.html")
    click.echo(str(path))
