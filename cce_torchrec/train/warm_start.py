"""`--warm-start RUN`: a run that goes on from another, with more ids and other features."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.checkpoint import LoadReport, checkpoint_info, load_checkpoint
from cce_torchrec.checkpoint.folder import RUN_FOLDER
from cce_torchrec.checkpoint.location import location
from cce_torchrec.checkpoint.manifest import CCETableRecord, TableRecord
from cce_torchrec.config import is_cce
from cce_torchrec.train import config_file
from cce_torchrec.train.run_folder import CONFIG

logger = logging.getLogger(__name__)

_KEPT = ("num_chunks", "num_rows", "num_helper_rows", "seed", "learned_codes", "track_counts",
         "rotate_chunks")  # fmt: skip
"""Fields of a CCE table without which its codes and codebooks would be those of another."""
_NO_INIT: dict[str, Any] = {"init_fn": None}


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """An earlier run, of which tables and network are taken over where they fit."""

    checkpoints: Path
    tables: dict[str, TableRecord]
    """By their names alone."""

    @classmethod
    def from_run(cls, run: str) -> WarmStart:
        """The earlier run in the folder or URI `run`.

        Raises:
            ValueError: it has no checkpoint.
        """
        checkpoints = location(run) / RUN_FOLDER
        # Before anything is built, as a wrong name is the likeliest mistake.
        try:
            found = checkpoint_info(checkpoints)
        except ValueError as error:
            raise ValueError(
                f"--warm-start {run}: {error}; name the --out of a run with --checkpoint-every"
            ) from error
        records = found.tables.values()
        return cls(checkpoints=checkpoints, tables={record.name: record for record in records})

    def compressed(self, features: Iterable[str], names: Sequence[str]) -> list[str]:
        """Of `features` those to compress: as they were, and of new ones those in `names`."""
        out = []
        for feature in features:
            # A feature's own table has its name; a joint one has another, and is made anew.
            record = self.tables.get(feature)
            if isinstance(record, CCETableRecord) if record else feature in names:
                out.append(feature)
        return out

    def as_before(self, config: EmbeddingBagConfig) -> EmbeddingBagConfig:
        """A table with the rows, chunks and seed that it had, so that it can be taken over."""
        record = self.tables.get(config.name)
        if not (is_cce(config) and isinstance(record, CCETableRecord)):
            return config
        # `init_fn` follows from bounds, and one that is given would be a custom one.
        kept: dict[str, Any] = {name: getattr(record, name) for name in _KEPT}
        return replace(config, **kept, **_NO_INIT)

    def load(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> LoadReport:
        """Takes over what fits, with the state of optimizers but their rates. Collective.

        Raises:
            ValueError: on every rank, if nothing fits, or the checkpoint is damaged.
        """
        report = load_checkpoint(
            self.checkpoints, model, optimizers=optimizers, strict=False, learning_rates="model"
        )
        told = {one.name: getattr(report, one.name) for one in fields(report)}
        for what in ("grown", "new", "missing", "conflicts"):
            if told[what]:
                logger.info("warm start: %s: %s", what, ", ".join(told[what]))
        return report


def earlier_vocabulary(run: str) -> Path:
    """The folder in which a run keeps how its ids are numbered: its own, or its --vocabulary."""
    folder = location(run)
    config = folder / CONFIG
    named = config_file.read_back(config).get("vocabulary") if config.exists() else None
    return folder if named is None else location(str(named))
