"""What a run trains on: a data set that every rank has read alike."""

from __future__ import annotations

import argparse

import torch.distributed as dist

from cce_torchrec import data
from cce_torchrec.checkpoint.location import location
from cce_torchrec.collectives import agree
from cce_torchrec.train import data_options
from cce_torchrec.train.warm_start import WarmStart, earlier_vocabulary


def shared_data(args: argparse.Namespace, start: WarmStart | None) -> data.Examples:
    """The data set, of which every rank has read the same: each step takes a part of it on each.

    Args:
        start: the run from which this one goes on, whose ids and forms of tables it keeps.

    Raises:
        ValueError: on every rank, if reading failed on any, or numbers of rows differ.
    """

    def read() -> tuple[data.Examples, int]:
        earlier = None if start is None else earlier_vocabulary(args.warm_start)
        table = data_options.table_options(args, location(args.vocabulary or args.out), earlier)
        dataset = data.load(args.dataset, args.data, args.model, args.split_seed, table)
        return dataset, dataset.num_train

    dataset, rows = agree(read, dist.group.WORLD)
    if len(set(rows)) > 1:
        raise ValueError(
            f"--data {args.data}: ranks 0 to {len(rows) - 1} have read {rows} rows to train on, "
            "and would take different numbers of steps; give all ranks the same file"
        )
    if start is not None:
        dataset.compressed = start.compressed(dataset.features, dataset.compressed)
    return dataset
