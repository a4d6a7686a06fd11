"""`cce-torchrec train` and `python -m cce_torchrec.train`."""

from __future__ import annotations

import os
import sys

import click

from cce_torchrec.train import config_file, options


@click.pass_context
def _train(ctx: click.Context, **_: object) -> None:
    args = options.resolved(ctx)
    ranks = ctx.params["nproc_per_node"]
    if ranks is not None:
        _start_ranks(ranks, config_file.given(ctx, leave_out="nproc_per_node"))
    # Loading torch and TorchRec takes seconds, which `--help` and bad options do not.
    from cce_torchrec.train.run import run

    failure = run(args)
    if failure is not None:
        raise click.ClickException(failure)


command = click.Command("train", params=options.PARAMS, help=options.PURPOSE, callback=_train)
"""Under torchrun with its ranks, otherwise as one."""


def _start_ranks(ranks: int, words: list[str]) -> None:
    """Becomes torchrun, with a port that is free.

    Raises:
        click.UsageError: torchrun has started this process already.
    """
    if "RANK" in os.environ:
        raise click.UsageError(
            "--nproc-per-node starts ranks, and this is one that torchrun has started; leave it out"
        )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["--nproc-per-node", str(ranks), "-m", "cce_torchrec.train", *words]
    # In its place, so that signals reach torchrun and its exit status is ours.
    os.execv(sys.executable, [*torchrun, *program])
