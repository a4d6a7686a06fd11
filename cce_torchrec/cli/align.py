"""`cce-torchrec align`: how far the vectors, neighbours and codes of two runs agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cce_torchrec.cli.text_columns import columns
from cce_torchrec.extras import load_extra
from cce_torchrec.reasons import first_line

_MEASURES = {
    "linear_cka": "CKA",
    "debiased_cka": "debiased CKA",
    "procrustes_distance": "Procrustes",
    "mean_cca": "CCA",
    "svcca": "SVCCA",
    "overlap": "neighbours shared",
    "imbalance": "imbalance A to B",
    "imbalance_back": "imbalance B to A",
}
"""By what they are called in the table."""


@click.command(name="align")
@click.argument("a")
@click.argument("b")
@click.option(
    "--table", "tables", multiple=True, help="Full name of a table to compare; default: all."
)
@click.option(
    "--common", is_flag=True, help="Compare the ids that both have where one table has more."
)
@click.option(
    "--counts",
    multiple=True,
    metavar="TABLE=FILE",
    help="How often each id of a table is looked up (.npy), by which it weighs.",
)
@click.option(
    "--names",
    multiple=True,
    nargs=3,
    metavar="TABLE A.npy B.npy",
    help="What the ids of a table are called in A and in B; ids of one name are compared.",
)
@click.option(
    "--max-ids",
    type=click.IntRange(2),
    help="Most ids of a table that are read, drawn by a hash; default: all.",
)
@click.option(
    "-k", default=10, show_default=True, type=click.IntRange(1), help="Neighbours of an id."
)
@click.option(
    "--sample",
    default=4096,
    show_default=True,
    type=click.IntRange(3),
    help="Ids whose neighbours are looked at.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write everything to this file, too.")
@click.option("--plot", metavar="FILE", help="Draw the measures with their intervals (.png, .svg).")
def command(
    a: str,
    b: str,
    tables: tuple[str, ...],
    counts: tuple[str, ...],
    names: tuple[tuple[str, str, str], ...],
    common: bool,
    max_ids: int | None,
    k: int,
    sample: int,
    json_file: str | None,
    plot: str | None,
) -> None:
    """Say how far the tables of A and B agree: vectors, neighbours and codes.

    A and B are folders of checkpoints, or of jobs whose latest one is meant; local paths or URIs of
    an object store. CKA, CCA and SVCCA are 1 where one table is the other, turned; the Procrustes
    distance is 0 there. Of unrelated tables debiased CKA is 0, the Procrustes distance nearly 1.41,
    the share of neighbours k of all, and the imbalance 1. In brackets are 95 % intervals for other
    ids of the same kind; two more runs would differ by more.
    """
    from cce_torchrec.alignment.saved import align_checkpoints

    found = align_checkpoints(
        a,
        b,
        tables=tables or None,
        counts=_counts_of(counts),
        names={table: (_array(a), _array(b)) for table, a, b in names},
        common=common,
        max_ids=max_ids,
        k=k,
        sample=sample,
    )
    if json_file:
        Path(json_file).write_text(json.dumps(found, indent=1) + "\n")
    if plot:
        draw(found, plot)
    click.echo("\n".join(lines_of(found)))
    # One table that cannot be compared is no reason to fail; all of them are.
    problems = [one for one in found["tables"].values() if "problem" in one]
    if len(problems) == len(found["tables"]):
        raise click.exceptions.Exit(1)


def _counts_of(options: tuple[str, ...]) -> dict[str, Any]:
    """The counts in the files of `options`, TABLE=FILE each.

    Raises:
        click.UsageError: an option that is no such pair, or a file that holds no row of numbers.
    """
    import numpy as np
    import torch

    found = {}
    for option in options:
        table, equals, file = option.partition("=")
        if not (table and equals and file):
            raise click.UsageError(f"--counts {option}: give TABLE=FILE.npy")
        try:
            found[table] = torch.from_numpy(_array(file).astype(np.float64))
        except (ValueError, TypeError) as error:
            raise click.UsageError(f"--counts {option}: {first_line(error)}") from error
    return found


def _array(file: str) -> Any:
    """What a .npy file holds.

    Raises:
        click.UsageError: it cannot be read.
    """
    import numpy as np

    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise click.UsageError(f"{file}: {first_line(error)}") from error


def lines_of(found: dict[str, Any]) -> list[str]:
    """What `align_checkpoints` gave, as it is read."""
    out = [f"A: {found['a']}", f"B: {found['b']}"]
    for side in "ab":
        out += [f"table only in {side.upper()}: {name}" for name in found[f"only_{side}"]]
    for name, table in found["tables"].items():
        out += ["", f"table {name}"]
        if "problem" in table:
            out.append(f"  not compared: {table['problem']}")
            continue
        near = table["neighbours"]
        head = [f"{table['ids']:,} ids", "", "95 % interval"]
        body = [[label, f"{own['value']:.3f}", between(own)] for label, own in intervals(table)]
        out += [f"  {line}" for line in columns(head, body, left=1)]
        if near is not None:
            out.append(
                f"  of {near['ids']:,} ids the {near['k']} nearest; by chance "
                f"{near['k'] / (near['ids'] - 1):.4f} are shared"
            )
        if table["codes"] is not None:
            shown = ", ".join(f"{one:.3f}" for one in table["codes"])
            out.append(f"  codes, adjusted mutual information by chunk: {shown}")
    return out


def intervals(table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What the measures of a table are called, and their intervals."""
    near = table["neighbours"] or {}
    found = [(label, table.get(name) or near.get(name)) for name, label in _MEASURES.items()]
    return [(label, own) for label, own in found if own is not None]


def between(own: dict[str, Any]) -> str:
    """The ends of an interval, if there is one."""
    low, high = own["low"], own["high"]
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def draw(found: dict[str, Any], file: str) -> None:
    """A panel for each table, a line for each measure, with its interval."""
    pyplot = load_extra("matplotlib.pyplot", "benchmarks", "a plot")
    shown = {name: one for name, one in found["tables"].items() if "problem" not in one}
    figure, axes = pyplot.subplots(
        1,
        max(1, len(shown)),
        squeeze=False,
        sharex=True,
        sharey=True,
        figsize=(2 + 2.6 * max(1, len(shown)), 3.5),
    )
    labels = list(_MEASURES.values())[::-1]
    for axis, (name, table) in zip(axes[0], shown.items(), strict=False):
        for label, own in intervals(table):
            low, high, value = own["low"], own["high"], own["value"]
            errors = None if low is None or high is None else [[value - low], [high - value]]
            axis.errorbar(value, labels.index(label), xerr=errors, fmt="o", capsize=3, color="C0")
        axis.set_yticks(range(len(labels)), labels)
        axis.grid(linewidth=0.3)
        # Of a full name, which has the path of its collection, the table alone fits.
        axis.set_title(f"{name.rpartition('.')[2]}, {table['ids']:,} ids", fontsize=10)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
