"""The log of a run on stderr, and what it says once: what was decided, and by which rule."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from tqdm import tqdm

from cce_torchrec.clustering import ClusteringSchedule
from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.gpu.usable import usable
from cce_torchrec.kmeans import native as kmeans_native
from cce_torchrec.lookup import native as lookup_native
from cce_torchrec.planning import PlanReport
from cce_torchrec.recipe import RARE_BELOW

logger = logging.getLogger(__name__)

_MANY = 12
"""Of steps, more than so many are not listed one by one."""


class _Handler(logging.Handler):
    """Writes lines above the bars that are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as logging's own handlers: what is told must not end a run
            self.handleError(record)


@contextmanager
def shown(level: str) -> Iterator[None]:
    """Inside, what the package logs is on stderr: on the first rank from `level` on.

    On the others from warnings on, which concern them alone.
    """
    package = logging.getLogger("cce_torchrec")
    least = getattr(logging, level.upper())
    if dist.get_rank() != 0:
        least = max(least, logging.WARNING)
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    before, propagates = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(least)
    package.propagate = False  # else a program that logs too would say it twice
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before)
        package.propagate = propagates


def say_decisions(
    args: argparse.Namespace,
    *,
    tables: Iterable[EmbeddingBagConfig],
    plan: PlanReport,
    schedule: ClusteringSchedule,
    total_steps: int,
    lr_rule: str,
    pipeline: str,
    device: torch.device,
) -> None:
    """Logs what was decided for a run, on the first rank.

    Args:
        args: its options.
        tables: as configured.
        plan: where they are.
        schedule: of clusterings.
        total_steps: of the run.
        lr_rule: why the tables' rate is what it is.
        pipeline: that was chosen.
        device: of this rank.
    """
    if dist.get_rank() != 0:
        return
    kinds: dict[str, set[str]] = {}
    for share in plan.tables:
        kinds.setdefault(share.sharding_type, set()).add(share.name)
    placed = ", ".join(f"{len(names)} tables {kind}" for kind, names in sorted(kinds.items()))
    ranks = ", ".join(f"rank {rank} {plan.rank_bytes(rank):,}" for rank in range(plan.world_size))
    logger.info("plan %s: %s; bytes of tables and their optimizer state: %s", args.plan, placed,
                ranks)  # fmt: skip
    for table in filter(is_cce, tables):
        logger.info("%s", _of_table(table, args))
    logger.info("clusterings: %s", _of_schedule(schedule, total_steps))
    logger.info("learning rate of the tables: %g, %s", args.lr, lr_rule)
    logger.info("pipeline: %s%s", pipeline, " (auto)" if args.pipeline == "auto" else "")
    logger.info("kernels: %s", _kernels(device))


def _of_table(table: CCEEmbeddingBagConfig, args: argparse.Namespace) -> str:
    """Rows and chunks of a CCE table, and its recipe with the reason."""
    shape = (
        f"table {table.name!r}: {table.num_embeddings:,} ids, {table.num_chunks} chunks of "
        f"{table.num_rows:,} main and {table.helper_rows:,} helper rows, codes of "
        f"{table.code_bits} bits"
    )
    if not table.learned_codes:
        return f"{shape}; codes are hashes, which are not learned"
    why = "as asked for"
    examples = table.examples_per_id
    if args.recipe == "auto" and args.model == "gmf":
        why = "as the network multiplies two embeddings"
    elif args.recipe == "auto" and examples is not None:
        side = "below" if examples < RARE_BELOW else "not below"
        why = f"as {examples:.3g} examples an id in one pass are {side} {RARE_BELOW:g}"
    return f"{shape}; recipe {table.recipe}, {why}"


def _of_schedule(schedule: ClusteringSchedule, total_steps: int) -> str:
    if schedule.rare is not None:
        own = replace(schedule, rare=None)
        rare = ClusteringSchedule(schedule.rare)
        return (
            f"{_of_schedule(own, total_steps)}; of tables of rare ids "
            f"{_of_schedule(rare, total_steps)}"
        )
    steps = clustering_steps(schedule, total_steps)
    if not steps:
        return "none"
    listed = ", ".join(map(str, steps[:_MANY]))
    if len(steps) > _MANY:
        listed += f", ... {steps[-1]}"
    last = f", the last of which finalizes (step {schedule.final})" if schedule.final else ""
    return f"{len(steps)} in {total_steps:,} steps, after steps {listed}{last}"


def clustering_steps(schedule: ClusteringSchedule, total_steps: int) -> list[int]:
    """The steps of a run after which it clusters."""
    return [step for step in range(1, total_steps + 1) if schedule.due(step)]


def _kernels(device: torch.device) -> str:
    if device.type == "cuda":
        own = "Triton's" if usable(device) else "none, but torch's operators"
        return f"{torch.cuda.get_device_name(device)}; of this package {own}"
    parts = {"K-means": kmeans_native.available(), "lookups": lookup_native.available()}
    compiled = [name for name, there in parts.items() if there]
    torchs = [name for name, there in parts.items() if not there]
    said = [f"compiled for {' and '.join(compiled)}"] if compiled else []
    said += [f"torch's operators for {' and '.join(torchs)} (not compiled)"] if torchs else []
    return f"{', '.join(said)}; torch's use {torch.backends.cpu.get_cpu_capability()}"
