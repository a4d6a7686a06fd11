"""Command line of the training program, and the rules behind its defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cce_torchrec.train import config_file, data_options
from cce_torchrec.train.parameters import BUDGETS, CALL_ALONE, CALL_PARAMS, SEEING, SETTINGS

if TYPE_CHECKING:  # neither the options nor `--help` need torch
    from cce_torchrec.data import Examples

PURPOSE = """Train DLRM or GMF with full or compressed tables.

\b
Under torchrun its ranks train together:
  torchrun --nproc-per-node 2 -m cce_torchrec.train --dataset synthetic
  cce-torchrec train --nproc-per-node 2 --dataset synthetic
"""
PARAMS: list[click.Parameter] = [
    click.Option(
        ["--config"],
        help="file in YAML with options of a run; those of the command line win over it",
        is_eager=True,  # its values are the others' defaults
        callback=config_file.read_config,
    ),
    *SETTINGS,
    *CALL_PARAMS,
]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of `python -m cce_torchrec.train`, by default those of the command line.

    Ends the program with status 2 and a sentence where they are wrong.
    """
    command = click.Command("cce_torchrec.train", params=PARAMS, help=PURPOSE)
    words = sys.argv[1:] if argv is None else argv
    try:
        with command.make_context("cce_torchrec.train", list(words)) as ctx:
            return resolved(ctx)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as ended:  # of --help
        sys.exit(ended.exit_code)


def resolved(ctx: click.Context) -> argparse.Namespace:
    """The options of a run, with the defaults that follow from other options.

    Raises:
        click.UsageError: what is wrong with them.
    """
    # First, as all that follows looks at the values that were taken.
    config_file.settle(ctx)
    values = {name: value for name, value in ctx.params.items() if name not in CALL_ALONE}
    args = argparse.Namespace(**values)
    if ctx.params["no_pipeline"]:
        args.pipeline = "none"
    if args.batch_size is None:
        args.batch_size = 4096 if args.model == "gmf" else 256
    # A row that the two factors of a product share would be multiplied by itself.
    if args.joint is None:
        args.joint = "no" if args.model == "gmf" else "rare"
    _check_numbers(args)
    _check_clusterings(args)
    data_options.check(args)
    if args.model == "gmf" and args.dataset != "ml-1m" and not data_options.of_two(args):
        raise click.UsageError(
            f"--model gmf multiplies two features; {args.dataset} has other features"
        )
    return args


def _check_numbers(args: argparse.Namespace) -> None:
    """Refuses numbers that are too small."""
    least = dict.fromkeys(("embedding_dim", "num_chunks", "epochs", "batch_size"), 1)
    least |= dict.fromkeys(("checkpoint_every", "log_every", "validate_every", "profile"), 0)
    for name, bound in (least | {"validate_rows": 1}).items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise click.UsageError(
                f"{config_file.option_name(name)} {value} must be at least {bound}"
            )
    if args.async_checkpoints and not args.checkpoint_every:
        raise click.UsageError(
            "--async-checkpoints says how, and no checkpoint is due: --checkpoint-every"
        )


def _check_clusterings(args: argparse.Namespace) -> None:
    """Refuses options of a clustering that would never come."""
    given = {
        "--finalize": args.finalize,
        "--clusterings": args.clusterings,
        "--clustering-memory": args.clustering_memory is not None,
    }
    asked = ", ".join(name for name, value in given.items() if value)
    if asked and args.method != "cce":
        raise click.UsageError(
            f"{asked}: --method {args.method} has nothing to cluster; leave it out"
        )
    if asked and args.clusterings == 0:
        raise click.UsageError(
            f"{asked}: nothing is clustered, as --clusterings is 0; give 1 or more"
        )


def rows_per_table(args: argparse.Namespace, dataset: Examples) -> dict[str, int]:
    """Main + helper rows of each compressed table, from the one budget that was given."""
    sizes = {name: dataset.features[name] for name in dataset.compressed}
    if not sizes and args.method != "full":
        raise ValueError(
            f"--method {args.method} has no table to compress: all have few ids "
            f"({dataset.features}); name some by --compressed, or take --method full"
        )
    if args.params_per_dim is not None:
        rows = dict.fromkeys(sizes, args.params_per_dim)
    elif args.table_bytes is not None:
        # Of tables without codes; those of CCE are paid for when they are configured.
        rows = {
            name: share // (4 * args.embedding_dim)
            for name, share in bytes_per_table(args, dataset).items()
        }
    elif args.num_rows is not None:
        rows = dict.fromkeys(sizes, 4 * args.num_rows)
    else:
        ratio = args.compression if args.compression is not None else 20.0
        if not ratio > 0:
            raise ValueError(f"--compression {ratio} must be positive")
        rows = {name: max(2, round(size / ratio)) for name, size in sizes.items()}
    if args.method != "full":
        _check_rows(args, rows, sizes)
    return rows


def _check_rows(
    args: argparse.Namespace, rows: Mapping[str, int], sizes: Mapping[str, int]
) -> None:
    """Refuses a budget that is too small for a table, or in which all full ones find room."""
    budget = next((name for name in BUDGETS if getattr(args, name) is not None), "compression")
    told = f"{config_file.option_name(budget)} {getattr(args, budget)}"
    few = [name for name, value in rows.items() if value < 2]
    if few:
        least = -(-8 * args.embedding_dim * sum(sizes.values()) // min(sizes.values()))
        bytes_needed = f"; with these features {least:,} bytes are the least"
        raise ValueError(
            f"{told}: tables {few} get less than two rows, which are the least"
            + bytes_needed * (budget == "table_bytes")
        )
    # As many rows as ids cost what full tables do, and leave nothing to cluster.
    full = 4 * args.embedding_dim * sum(sizes.values())
    held = sum(rows.values()) >= sum(sizes.values())
    if held or (args.table_bytes is not None and args.table_bytes >= full):
        raise ValueError(
            f"{told} holds the full tables of {list(sizes)}, {sum(sizes.values()):,} rows in "
            f"{full:,} bytes; take --method full, or a smaller budget"
        )


def bytes_per_table(args: argparse.Namespace, dataset: Examples) -> dict[str, int]:
    """Of --table-bytes, what each compressed table gets: in proportion to its ids."""
    total = sum(dataset.features[name] for name in dataset.compressed)
    return {name: args.table_bytes * dataset.features[name] // total for name in dataset.compressed}


def set_defaults(
    args: argparse.Namespace, dataset: Examples, rows: dict[str, int], rare: bool
) -> str:
    """Fills in --lr by the rule of docs/train.md, and says why; `rare`: if all CCE tables are."""
    why = "as asked for"
    if args.lr is None:
        full = sum(dataset.features[name] for name in dataset.compressed)
        frequent = args.method == "cce" and not rare
        compression = 1.0 if args.method == "full" or frequent else full / sum(rows.values())
        args.lr = 0.1 if compression >= 10 else 0.03
        why = f"as the compressed tables have 1/{compression:.3g} of their full rows"
        if frequent:
            why = "as CCE tables are of frequent ids"
        elif args.method == "full":
            why = "as nothing is compressed"
    if args.clusterings is None and args.method != "cce":
        args.clusterings = 0
    return why


def lasting(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a resumed run must share with the run that saved its checkpoint."""
    # They say where and how the run goes on, and not what is trained.
    free = ("out", "checkpoint_every", "async_checkpoints", "resume", "overwrite", "pipeline",
            "timeout", "plan", "data", *data_options.FREE, *SEEING)  # fmt: skip
    return {name: value for name, value in vars(args).items() if name not in free}


BEFORE = {"recipe": "frequent", "joint": "no"}
"""What runs did that were saved before there were these options."""


def check_same(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """Refuses to resume a run with other options.

    Raises:
        ValueError: naming each option with both values.
    """
    saved = BEFORE | saved
    differing = [name for name in current if saved.get(name) != current[name]]
    if differing:
        changes = ", ".join(
            f"--{name.replace('_', '-')} was {saved.get(name)} and is {current[name]}"
            for name in differing
        )
        raise ValueError(
            f"{checkpoint}: {changes}; resume with the same options, or start anew in another --out"
        )
