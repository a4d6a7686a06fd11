"""What a run that has ended leaves to be read: health.json and report.html."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from cce_torchrec.checkpoint.health import model_health
from cce_torchrec.checkpoint.location import write_whole
from cce_torchrec.collectives import Ranks
from cce_torchrec.report.page import write_report

logger = logging.getLogger(__name__)

REPORT = "report.html"


def write_health(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], out: Path, step: int
) -> None:
    """Writes health.json, of the model as it is now. Collective."""
    # Of the trained model itself: a run need not have saved any checkpoint.
    health = model_health(model, optimizers, step=step)
    text = json.dumps(health, indent=1) + "\n"
    Ranks(None).first(lambda: write_whole(out / "health.json", text))


def write_page(out: Path, rank: int) -> None:
    """Writes report.html on the first rank; where that fails a warning says so, and nothing else.

    The run has ended well by then, and `cce-torchrec report` makes the page at any time.
    """
    if rank != 0:
        return
    try:
        write_report([out], out / REPORT)
    except Exception as error:  # a page about a run is no reason for the run to fail
        logger.warning("%s is not written (%s)", out / REPORT, error)
