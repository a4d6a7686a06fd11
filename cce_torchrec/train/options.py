"""Command line of the training program, and the rules behind its defaults."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cce_torchrec.train import data_options

if TYPE_CHECKING:  # neither the options nor `--help` need torch
    from cce_torchrec.data import Examples

PIPELINES = ("auto", "sparse-dist", "prefetch", "none")
DEFAULT_SPLIT_SEED = 20231211


def _parser() -> argparse.ArgumentParser:
    purpose = "Train DLRM or GMF with full or compressed tables."
    parser = argparse.ArgumentParser(prog="cce_torchrec.train", description=purpose)

    def add(name: str, help: str = "", **kwargs: Any) -> None:
        if kwargs.get("default") is not None:
            help = f"{help}; default %(default)s".removeprefix("; ")
        parser.add_argument(name, help=help, **kwargs)

    add("--model", choices=["dlrm", "gmf"], default="dlrm")
    datasets = ["flights", "ml-1m", "synthetic", *data_options.DATASETS]
    add("--dataset", choices=datasets, default="flights")
    add("--data", help="file or folder of the data set; flights and synthetic need none")
    data_options.add_options(add)
    add("--method", choices=["cce", "full", "hash", "ce"], default="cce")
    add("--embedding-dim", type=int, default=16)
    add(
        "--num-chunks",
        type=int,
        help="default 4, 8 with --params-per-dim, or what fits",
    )
    # Each says how many rows a table has: of two that disagree one would be ignored.
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--params-per-dim", type=int, help="main + helper rows of each table")
    budget.add_argument("--num-rows", type=int, help="main rows of each table; 3x helper beside")
    budget.add_argument("--compression", type=float, help="full over compressed rows; default 20")
    budget.add_argument(
        "--table-bytes", type=int, help="of all compressed tables, codes counted; by their ids"
    )
    recipes = ["frequent", "rare", "auto"]
    add("--recipe", choices=recipes, default="auto", help="auto: by the examples of an id")
    joints = ["no", "rare", "all"]
    add("--joint", choices=joints, help="features that share a table; default rare, no for gmf")
    add("--epochs", type=int, default=10, help="the same in a resumed run")
    add("--batch-size", type=int, help="of all ranks; default 4096 for gmf, 256 for dlrm")
    add("--optimizer", choices=["rowwise_adagrad", "adagrad", "sgd"], default="rowwise_adagrad")
    add("--lr", type=float, help="of the tables; default 0.03, or 0.1: see docs/train.md")
    add("--dense-lr", type=float, default=1e-3, help="Adam, of everything but the tables")
    add(
        "--clusterings",
        type=int,
        help="evenly spread; by default as many as the ids want: see docs/train.md",
    )
    add("--clustering-memory", type=int, help="bytes beside the model; see cluster(memory_limit=)")
    add("--finalize", action="store_true", help="the last clustering gives main the helper's rows")
    add("--seed", type=int, default=0, help="of hashes, initial values and order")
    add("--split-seed", type=int, default=DEFAULT_SPLIT_SEED, help="of the held-out rows")
    add("--plan", choices=["tw", "cw", "rw", "auto"], default="auto")
    add("--out", default="runs/last", help="folder, or URI of an object store (s3://...)")
    add("--checkpoint-every", type=int, default=0, help="optimizer steps; 0: never")
    add("--async-checkpoints", action="store_true", help="written while training goes on")
    add("--resume", action="store_true", help="from the latest checkpoint in --out, if any")
    add(
        "--pipeline",
        choices=PIPELINES,
        default="auto",
        help="of batches; auto is sparse-dist on CUDA and on several ranks, prefetch is for CUDA",
    )
    add(
        "--no-pipeline",
        dest="pipeline",
        action="store_const",
        const="none",
        help="the same as --pipeline none: the plain loop",
    )
    add("--timeout", type=float, default=600.0, help="seconds until a rank gives up on others")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of `python -m cce_torchrec.train`."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.batch_size is None:
        args.batch_size = 4096 if args.model == "gmf" else 256
    # A row that the two factors of a product share would be multiplied by itself.
    if args.joint is None:
        args.joint = "no" if args.model == "gmf" else "rare"
    if args.checkpoint_every < 0:
        parser.error(f"--checkpoint-every {args.checkpoint_every} must be 0 or more steps")
    for name in ("embedding_dim", "num_chunks", "epochs", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.async_checkpoints and not args.checkpoint_every:
        parser.error("--async-checkpoints says how, and no checkpoint is due: --checkpoint-every")
    _check_clusterings(parser, args)
    data_options.check(parser, args)
    if args.model == "gmf" and args.dataset != "ml-1m" and not data_options.of_two(args):
        parser.error(f"--model gmf multiplies two features; {args.dataset} has other features")
    return args


def _check_clusterings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options of a clustering that would never come."""
    given = {
        "--finalize": args.finalize,
        "--clusterings": args.clusterings,
        "--clustering-memory": args.clustering_memory is not None,
    }
    asked = ", ".join(name for name, value in given.items() if value)
    if asked and args.method != "cce":
        parser.error(f"{asked}: --method {args.method} has nothing to cluster; leave it out")
    if asked and args.clusterings == 0:
        parser.error(f"{asked}: nothing is clustered, as --clusterings is 0; give 1 or more")


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
    bad = [name for name, value in rows.items() if value < 2]
    if bad:
        raise ValueError(f"tables {bad}: at least 2 rows are needed; raise the budget")
    return rows


def bytes_per_table(args: argparse.Namespace, dataset: Examples) -> dict[str, int]:
    """Of --table-bytes, what each compressed table gets: in proportion to its ids."""
    total = sum(dataset.features[name] for name in dataset.compressed)
    return {name: args.table_bytes * dataset.features[name] // total for name in dataset.compressed}


def set_defaults(
    args: argparse.Namespace, dataset: Examples, rows: dict[str, int], rare: bool
) -> None:
    """Fills in --lr by the rule of docs/train.md; `rare`: whether all CCE tables are that."""
    if args.lr is None:
        full = sum(dataset.features[name] for name in dataset.compressed)
        frequent = args.method == "cce" and not rare
        compression = 1.0 if args.method == "full" or frequent else full / sum(rows.values())
        args.lr = 0.1 if compression >= 10 else 0.03
    if args.clusterings is None and args.method != "cce":
        args.clusterings = 0


def lasting(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a resumed run must share with the run that saved its checkpoint."""
    # They say where and how the run goes on, and not what is trained.
    free = ("out", "checkpoint_every", "async_checkpoints", "resume", "pipeline", "timeout", "plan",
            "data", *data_options.FREE)  # fmt: skip
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
