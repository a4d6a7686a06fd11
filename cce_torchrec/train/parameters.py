"""The options of the training program: names, units, defaults, and what help says of each."""

from __future__ import annotations

import click

from cce_torchrec.train import data_options
from cce_torchrec.train.option import choice, flag, option

DEFAULT_SPLIT_SEED = 20231211
PIPELINES = ("auto", "sparse-dist", "prefetch", "none")

# Groups as `--help` shows them: data, tables, training, and how the run goes.
_DATA = [
    option("--model", type=choice("dlrm", "gmf"), default="dlrm", help="network over the tables"),
    option(
        "--dataset",
        type=choice("flights", "ml-1m", "synthetic", *data_options.DATASETS),
        default="flights",
        help="what is trained on; table and criteo are streamed from files of your own",
    ),
    option("--data", help="file or folder of the data set; flights and synthetic need none"),
    *data_options.PARAMS,
]
# Each says how many rows a table has: of two that disagree one would be ignored.
BUDGETS = ("params_per_dim", "num_rows", "compression", "table_bytes")
_TABLES = [
    option(
        "--method",
        type=choice("cce", "full", "hash", "ce"),
        default="cce",
        help="of the tables: learned codes and hashes, none, one hash, or hashes of chunks",
    ),
    option("--embedding-dim", type=int, default=16, help="values of an embedding"),
    option(
        "--num-chunks",
        type=int,
        help="parts of an embedding with codes of their own; default 4, or 8 with "
        "--params-per-dim, --method ce, and of rare ids with --table-bytes; or what fits",
    ),
    option("--params-per-dim", type=int, help="main + helper rows of each table"),
    option("--num-rows", type=int, help="main rows of each table; three times as many helper rows"),
    option("--compression", type=float, help="full over compressed rows; default 20"),
    option("--table-bytes", type=int, help="bytes of all compressed tables, codes counted"),
    option(
        "--recipe",
        type=choice("frequent", "rare", "auto"),
        default="auto",
        help="for ids with many examples, with few, or by their number",
    ),
    option(
        "--joint",
        type=choice("no", "rare", "all"),
        help="features that share a table; default rare, no for gmf",
    ),
]
_TRAINING = [
    option("--epochs", type=int, default=10, help="passes over the data"),
    option(
        "--batch-size",
        type=int,
        help="examples of a step on all ranks; default 4096 for gmf, 256 for dlrm",
    ),
    option(
        "--optimizer",
        type=choice("rowwise_adagrad", "adagrad", "sgd"),
        default="rowwise_adagrad",
        help="of the tables",
    ),
    option("--lr", type=float, help="rate of the tables; default 0.03, or 0.1: see docs/train.md"),
    option("--dense-lr", type=float, default=1e-3, help="rate of Adam, of all but the tables"),
    option(
        "--clusterings",
        type=int,
        help="evenly spread; by default as many as the ids want: see docs/train.md",
    ),
    option(
        "--clustering-memory",
        type=int,
        help="bytes beside the model that a clustering may take; default from what is free",
    ),
    flag("--finalize", help="the last clustering gives main the helper's rows"),
    option(
        "--warm-start",
        help="folder or URI of an earlier run, whose ids keep their numbers and whose tables, with "
        "their rows, and network are taken over where they fit",
    ),
    option("--seed", type=int, default=0, help="of hashes, initial values and order"),
    # Apart from --seed, so that runs of several seeds validate on the same rows.
    option("--split-seed", type=int, default=DEFAULT_SPLIT_SEED, help="of the held-out rows"),
]
_RUN = [
    option(
        "--plan",
        type=choice("tw", "cw", "rw", "auto"),
        default="auto",
        help="tables on one rank each, chunks spread, ids spread, or what the planner finds",
    ),
    option("--out", default="runs/last", help="folder, or URI of an object store (s3://...)"),
    option("--checkpoint-every", type=int, default=0, help="optimizer steps; 0 is never"),
    flag("--async-checkpoints", help="checkpoints are written while training goes on"),
    option(
        "--pipeline",
        type=choice(*PIPELINES),
        default="auto",
        help="of batches; auto is sparse-dist on CUDA and on several ranks, prefetch is for CUDA",
    ),
    option("--timeout", type=float, default=600.0, help="seconds until a rank gives up on others"),
]
_SEEING = [
    option(
        "--log-every",
        type=int,
        default=0,
        help="optimizer steps between lines of metrics.jsonl; 0 is 25 to 100 lines a pass",
    ),
    option(
        "--validate-every",
        type=int,
        default=0,
        help="optimizer steps between validations; 0 is at the end of each pass only",
    ),
    option(
        "--validate-rows",
        type=int,
        help="examples that validate, the first ones, in whole batches; default all",
    ),
    flag("--tensorboard", help="write TensorBoard's scalars to --out/tensorboard"),
    option(
        "--profile",
        type=int,
        default=0,
        help="optimizer steps of which --out/profile gets a trace of each rank; 0 is none",
    ),
    option(
        "--log-level",
        type=choice("debug", "info", "warning", "error"),
        default="info",
        help="least of what is said on stderr, by the first rank",
    ),
]
SETTINGS: list[click.Option] = [*_DATA, *_TABLES, *_TRAINING, *_RUN, *_SEEING]
"""What a configuration file may hold."""
# A file that said these would do other things when it is read a second time.
CALL_PARAMS: list[click.Option] = [
    flag("--no-pipeline", help="the same as --pipeline none: the plain loop"),
    flag("--resume", help="go on from the latest checkpoint in --out, if there is one"),
    flag("--overwrite", help="replace the run of another configuration in --out"),
    option(
        "--nproc-per-node",
        type=click.IntRange(min=1),
        help="start so many ranks on this machine, by torchrun; default one, without it",
    ),
]
SEEING = tuple(str(parameter.name) for parameter in _SEEING)
"""Options that say what is told of a run, and nothing of what is trained."""
CALL = ("config", "no_pipeline", "resume", "overwrite", "nproc_per_node")
"""Options that say how the program is called, and nothing of the run."""
CALL_ALONE = ("config", "no_pipeline", "nproc_per_node")
"""Those of them that no run looks at."""
