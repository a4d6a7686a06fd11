"""run.json: what a run is, and whether it still runs, has finished or has failed."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchrec.modules.embedding_configs import EmbeddingBagConfig, data_type_to_dtype

from cce_torchrec.checkpoint.location import write_whole
from cce_torchrec.config import is_cce
from cce_torchrec.planning import PlanReport
from cce_torchrec.torchrec_internals import default_store
from cce_torchrec.train.records import plain, settings
from cce_torchrec.versions import installed_versions

logger = logging.getLogger(__name__)

_FAILURE = "cce_torchrec/train/failure"
"""Where the first rank finds in the job's store why another has failed."""


class RunFile:
    """run.json of one run; the first rank writes it, the others tell it why they fail.

    Args:
        out: folder of the run.
        what: all of it but state, error, started and ended.
    """

    def __init__(self, out: Path, what: dict[str, Any]) -> None:
        self._file = out / "run.json"
        self._what = what
        self._started = time.time()

    def write(self, state: str, error: str | None = None) -> None:
        """Replaces the file, on the first rank.

        Raises:
            ValueError: it cannot be written.
        """
        if dist.get_rank() != 0:
            return
        ended = None if state == "running" else time.time()
        head = {"state": state, "error": error, "started": self._started, "ended": ended}
        write_whole(self._file, json.dumps(plain(head | self._what), indent=1) + "\n")

    def failed(self, error: BaseException) -> None:
        """Says on this rank that the run fails by `error`, about which it is silent itself."""
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyboardInterrupt | SystemExit):
            said = "it was asked to end (by a signal)"
        store = default_store()
        if dist.get_rank() != 0:
            with suppress(Exception):  # the store may be gone, with the first rank
                store.set(_FAILURE, f"rank {dist.get_rank()}: {said}")
            return
        # Where another rank has ended, this one knows only that a connection was closed.
        with suppress(Exception):
            if not isinstance(error, ValueError | OSError) and store.check([_FAILURE]):
                said = store.get(_FAILURE).decode()
        try:
            self.write("failed", said)
        except Exception as second:  # a full disk may be why the run fails
            logger.warning("%s says still that the run is on (%s)", self._file, second)


def describe(
    args: argparse.Namespace,
    configs: Sequence[EmbeddingBagConfig],
    plan: PlanReport,
    device: str,
    steps: dict[str, Any],
) -> dict[str, Any]:
    """What run.json says of a run.

    Args:
        configs: the tables that it starts with.
        plan: where they are.
        device: of its ranks.
        steps: `epochs`, `steps_per_epoch` and `clustering_steps`.
    """
    return {
        "world_size": plan.world_size,
        "device": device,
        "settings": settings(args),
        "versions": installed_versions(),
        "tables": [_table(config, plan) for config in configs],
        **steps,
    }


def _table(config: EmbeddingBagConfig, plan: PlanReport) -> dict[str, Any]:
    shares = [share for share in plan.tables if share.name == config.name]
    itemsize = data_type_to_dtype(config.data_type).itemsize
    full = config.num_embeddings * config.embedding_dim * itemsize
    out = {
        "name": config.name,
        "kind": "plain",
        "features": list(config.feature_names),
        "num_embeddings": config.num_embeddings,
        "embedding_dim": config.embedding_dim,
        "num_chunks": None,
        "num_rows": None,
        "num_helper_rows": None,
        "code_bits": None,
        "recipe": None,
        "codebook_bytes": full,
        "code_bytes": 0,
        "optimizer_bytes": sum(share.optimizer_bytes for share in shares),
        "full_bytes": full,
        "sharding": shares[0].sharding_type if shares else None,
        "ranks": sorted({share.rank for share in shares}),
    }
    if is_cce(config):
        kept = ("num_chunks", "num_rows", "num_helper_rows", "code_bits", "recipe",
                "codebook_bytes")  # fmt: skip
        out |= {"kind": "CCE", **{name: getattr(config, name) for name in kept}}
        out["code_bytes"] = config.code_bytes + config.notes_bytes(config.num_embeddings)
    return out
