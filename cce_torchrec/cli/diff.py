"""`cce-torchrec diff`: how two checkpoints differ."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import click

from cce_torchrec.cli.text_columns import columns

_MOST = 20
"""Lines of one kind; --json has all."""


@click.command(name="diff")
@click.argument("a")
@click.argument("b")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write everything to this file, too; - is stdout."
)
@click.pass_context
def command(ctx: click.Context, a: str, b: str, json_file: str | None) -> None:
    """Compare two checkpoints, A and B: settings, tables, codes, embeddings, optimizers, the rest.

    A and B are folders of checkpoints, or of jobs whose latest one is meant; local paths or URIs of
    an object store. Codes are compared so that renumbered clusters do not count, and numbers of
    ranks, versions and `extra` are told without counting. Exit status: 0 if they are bit-equal, 1
    if they differ, 2 if one cannot be read.
    """
    try:
        from cce_torchrec.checkpoint.compare import compare_checkpoints
        from cce_torchrec.checkpoint.location import location, write_whole

        found = compare_checkpoints(a, b)
        text = json.dumps(found, indent=1) + "\n"
        if json_file not in (None, "-"):
            write_whole(location(str(json_file)), text)
    except (ValueError, OSError, ImportError) as error:  # which have status 1 elsewhere
        click.echo(f"Error: {error}", err=True)
        ctx.exit(2)
    click.echo(text if json_file == "-" else "\n".join(lines_of(found)), nl=json_file != "-")
    ctx.exit(0 if found["equal"] else 1)


def lines_of(found: dict[str, Any]) -> list[str]:
    """What `compare_checkpoints` gave, as it is read."""
    out = [f"a: {found['a']}", f"b: {found['b']}"]
    for name in ("step", "world_size", "format"):
        if found[name] is not None:
            out.append(f"{name.replace('_', ' ')}: {found[name][0]:,} and {found[name][1]:,}")
    if found["schedule"] is not None:
        out.append(f"schedule: {_both(found['schedule'])}")
    for name in ("versions", "settings", "extra"):
        out += _named(name, found[name])
    out += _optimizers(found["optimizers"])
    if found["random_state"]:
        out.append("random states differ")
    if found["objects"]:
        out.append(f"extra states of modules differ: {', '.join(found['objects'])}")
    out += _tables(found["tables"])
    out += _dense(found["dense"])
    return [*out, "", "bit-equal" if found["equal"] else "they differ"]


def _both(pair: Iterable[Any]) -> str:
    return " and ".join(_short(json.dumps(value)) for value in pair)


def _short(text: str) -> str:
    return text if len(text) <= 50 else f"{text[:47]}..."


def _cut(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST
    return lines[:_MOST] + [f"  and {more} more (--json has them)"] * (more > 0)


def _named(what: str, changes: dict[str, Any]) -> list[str]:
    if not changes:
        return []
    return [f"{what}:", *_cut([f"  {name}: {_both(pair)}" for name, pair in changes.items()])]


def _optimizers(found: list[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in found:
        names = entry["parameters"]
        whose = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more parameters"
        changes = ", ".join(f"{name} {_both(pair)}" for name, pair in entry["changes"].items())
        lines.append(f"  {whose}: {changes}")
    return ["settings of optimizers:", *_cut(lines)] if lines else []


def _tables(found: dict[str, Any]) -> list[str]:
    out = [f"table only in {side}: {name}" for side in "ab" for name in found[f"only_{side}"]]
    for table in found["both"]:
        for name, pair in table["config"].items():
            out.append(f"table {table['name']}: {name} {_both(pair)}")
    head = ["table", "codes changed", "embeddings differ by", "of ids", "optimizer state by"]
    body = [
        [table["name"], _changed(table), _distance(table), _ids(table), _state(table)]
        for table in found["both"]
        if not table["equal"]
    ]
    equal = sum(table["equal"] for table in found["both"])
    if equal:
        out.append(f"{equal} of {len(found['both'])} tables are bit-equal")
    return out + (["", *columns(head, body, left=1)] if body else [])


def _changed(table: dict[str, Any]) -> str:
    if not table["codes"]:
        return "" if table["codes_equal"] is None else "other chunks"
    if table["codes_equal"]:
        return "none"
    # A line a table; all chunks are in --json.
    low, high = min(table["codes"]), max(table["codes"])
    if high == 0:
        return "renumbered"
    return f"{low:.2%}" if low == high else f"{low:.2%} to {high:.2%}"


def _distance(table: dict[str, Any]) -> str:
    found = table["embeddings"]
    if found is None:
        return "other dimension"
    norm = found["relative_norm"]
    return "a is zero" if norm is None else f"{norm:.3g}"


def _ids(table: dict[str, Any]) -> str:
    found = table["embeddings"]
    if found is None:
        return ""
    return f"{found['ids']:,}{'' if found['exact'] else ' (sample)'}"


def _state(table: dict[str, Any]) -> str:
    """The largest relative norm of the differences of the optimizer's state."""
    own = {k: v for k, v in table["tensors"].items() if k.startswith("optimizer.")}
    sides = [key for side in ("only_a", "only_b") for key in table[side]]
    if any(key.startswith("optimizer.") for key in sides) or any(
        "shape" in v for v in own.values()
    ):
        return "other state"
    if not own:
        return "0"
    norms = [one["relative_norm"] for one in own.values()]
    return "a is zero" if None in norms else f"{max(norms):.3g}"


def _dense(found: dict[str, Any]) -> list[str]:
    out = [f"tensor only in {side}: {name}" for side in "ab" for name in found[f"only_{side}"]]
    if found["equal"]:
        out.append(f"{found['equal']} tensors beside the tables are bit-equal")
    lines = []
    for key, one in found["differing"].items():
        if "shape" in one:
            lines.append(f"  {key}: {_both(one['shape'])}, {_both(one['dtype'])}")
        else:
            lines.append(
                f"  {key}: at most {one['max_abs']:.3g} apart, relative {one['max_relative']:.3g}"
                + (f", {one['not_finite']} not finite" if one["not_finite"] else "")
            )
    return _cut(out) + (["other tensors:", *_cut(lines)] if lines else [])
