"""`cce-torchrec inspect`: what a checkpoint holds, and how its clusters are."""

from __future__ import annotations

import json
from typing import Any

import click

from cce_torchrec.cli.text_columns import columns

_MOST_SETTINGS = 60
"""Lines of settings that are shown; --json has all."""


@click.command(name="inspect")
@click.argument("checkpoint")
@click.option(
    "--table", "tables", multiple=True, metavar="NAME",
    help="Look into this table only, by its name or collection.name; may be given several times."
    "  [default: all]",
)  # fmt: skip
@click.option(
    "--json", "json_file", metavar="FILE", help="Write everything to this file, too; - is stdout."
)
@click.option(
    "--fast", is_flag=True, show_default=True,
    help="Read the manifest only: no checksums, no health of clusters.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context, checkpoint: str, tables: tuple[str, ...], json_file: str | None, fast: bool
) -> None:
    """Say what CHECKPOINT holds, how its clusters are, and which files are damaged.

    CHECKPOINT is the folder of one, or of a job whose latest one is meant; a local path or the URI
    of an object store. Sizes are in bytes. Exit status: 0, or 1 if a file is damaged or missing.
    """
    from cce_torchrec.checkpoint.inspection import inspect_checkpoint
    from cce_torchrec.checkpoint.location import location, write_whole

    found = inspect_checkpoint(checkpoint, tables or None, fast=fast)
    if json_file != "-":
        click.echo("\n".join(lines_of(found)))
    if json_file is not None:
        text = json.dumps(found, indent=1) + "\n"
        if json_file == "-":
            click.echo(text, nl=False)
        else:
            write_whole(location(json_file), text)
    # As of a file system check: a script need not read the output.
    ctx.exit(1 if found["damaged"] else 0)


def lines_of(found: dict[str, Any]) -> list[str]:
    """What `inspect_checkpoint` gave, as it is read."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    out = [
        found["path"],
        f"step {found['step']:,}, format {found['format']}, saved by {found['world_size']} "
        f"rank{'s' * (found['world_size'] != 1)} with {versions or 'unknown versions'}",
        _schedule(found["schedule"]),
        f"finalized tables: {', '.join(found['finalized']) or 'none'}",
        *_files(found),
        *_settings(found["extra"]),
        "",
        *_tables(found),
    ]
    for table in found["tables"]:
        out += _health(table)
    return out


def _after(steps: list[int]) -> str:
    return f"after steps {', '.join(f'{step:,}' for step in steps)}" if steps else "never"


def _schedule(schedule: dict[str, Any] | None) -> str:
    if schedule is None:
        return "clustering schedule: none is saved"
    said = [_after(schedule["steps"])] if schedule["steps"] else []
    if schedule["interval"]:
        said.append(f"every {schedule['interval']:,} steps")
    if schedule["final"]:
        said.append(f"finalize after step {schedule['final']:,}")
    if schedule["rare"] is not None:
        said.append(f"tables of rare ids {_after(schedule['rare'])}")
    return f"clustering schedule: {', '.join(said) or 'never'}"


def _files(found: dict[str, Any]) -> list[str]:
    files, damaged = found["files"], found["damaged"]
    size = f"files: {len(files)}, {found['bytes']:,} bytes"
    if damaged is None:
        return [f"{size} (not read)"]
    if not damaged:
        return [f"{size}, all as they were written"]
    out = [f"{size}; {len(damaged)} damaged, load another checkpoint:"]
    return out + [f"  {name}: {files.get(name, {}).get('damage') or 'damaged'}" for name in damaged]


def _settings(extra: dict[str, Any] | None) -> list[str]:
    if not isinstance(extra, dict) or not extra:
        return ["settings: none are saved"]
    # The training program keeps more than settings there.
    settings = extra["settings"] if isinstance(extra.get("settings"), dict) else extra
    out = ["settings:"]
    for name, value in list(settings.items())[:_MOST_SETTINGS]:
        text = json.dumps(value)
        out.append(f"  {name}: {text if len(text) <= 70 else text[:67] + '...'}")
    more = len(settings) - _MOST_SETTINGS
    return out + [f"  and {more} more (--json has them)"] * (more > 0)


def _tables(found: dict[str, Any]) -> list[str]:
    head = ["table", "kind", "ids", "dim", "chunks", "rows", "rows, bytes", "codes", "optimizer",
            "of full"]  # fmt: skip
    body = []
    for table in found["tables"]:
        # Optimizer state is not in the share: both sides would have it.
        size, cce = table["bytes"], table["kind"] == "CCE"
        share = (size["rows"] + size["codes"] + (size["notes"] or 0)) / table["full_bytes"]
        body.append(
            [
                table["name"], table["kind"], f"{table['num_embeddings']:,}",
                f"{table['embedding_dim']}", f"{table['num_chunks']}" if cce else "",
                f"{table['num_rows']:,} + {table['num_helper_rows']:,}" if cce else "",
                f"{size['rows']:,}", f"{size['codes']:,}" if cce else "",
                f"{size['optimizer']:,}", f"{share:.1%}",
            ]
        )  # fmt: skip
    out = columns(head, body, left=2)
    if found["dense"] is not None:
        dense = found["dense"]
        out.append(
            f"all else: {dense['model']['tensors']} tensors, {dense['model']['bytes']:,} bytes; "
            f"their optimizers {dense['optimizer']['bytes']:,} bytes"
        )
    return out


def _health(table: dict[str, Any]) -> list[str]:
    if table["not_read"] is not None:
        return ["", f"{table['name']} is not read: {table['not_read']}"]
    health = table["health"]
    if health is None:
        return []
    own = health["optimizer"]
    kind = f"{own['kind'] or 'no optimizer is saved'}"
    states = "".join(
        f"; {name} {_spread(state['values']['quantiles'])}" for name, state in own["state"].items()
    )
    out = [""]
    if table["kind"] == "CCE":
        done = health["clusterings"]
        out.append(f"{table['name']}: {done} clustering{'s' * (done != 1)}, {kind}{states}")
        out += _chunks(health)
    else:
        rows = health["rows"]
        out.append(f"{table['name']}: {kind}{states}")
        if rows is not None:
            norms = _spread(rows["norms"]["quantiles"])
            out.append(f"  norms of rows {norms}; {rows['zero']:,} zero")
        if health["untouched"] is not None:
            out.append(f"  rows that were never trained: {health['untouched']:.1%}")
    return out + [f"  warning: {text}" for text in health["warnings"]]


def _chunks(health: dict[str, Any]) -> list[str]:
    head = ["chunk", "codes used", "imbalance", "perplexity", "helper rows read", "main norm",
            "helper norm", "energy in helper"]  # fmt: skip
    body = []
    for chunk in health["chunks"]:
        k, dead = health["num_rows"], chunk["empty_codes"]
        helper, unread = health["num_helper_rows"], chunk["dead_helper_rows"]
        energy = chunk["helper_energy"]
        body.append(
            [
                f"{chunk['chunk']}", f"{k - dead:,} of {k:,}", f"{chunk['imbalance']:.3g}",
                f"{chunk['perplexity']:,.1f}",
                f"{helper - unread:,} of {helper:,}" if helper else "none",
                _median(chunk["main"]), _median(chunk["helper"]),
                "" if energy is None or not helper else f"{energy:.1%}",
            ]
        )  # fmt: skip
    return [f"  {line}" for line in columns(head, body, left=1)]


def _median(rows: dict[str, Any] | None) -> str:
    if rows is None or rows["norms"]["quantiles"]["p50"] is None:
        return ""
    return f"{rows['norms']['quantiles']['p50']:.3g}"


def _spread(quantiles: dict[str, Any]) -> str:
    """The middle, and where nine tenths are."""
    if quantiles["p50"] is None:
        return "not finite"
    return f"{quantiles['p50']:.3g} ({quantiles['p5']:.3g} to {quantiles['p95']:.3g})"
