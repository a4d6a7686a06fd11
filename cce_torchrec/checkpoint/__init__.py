"""Checkpoints of whole training jobs, written so that a kill leaves the previous one loadable."""

from cce_torchrec.checkpoint.folder import latest_checkpoint
from cce_torchrec.checkpoint.load import LoadReport, load_checkpoint
from cce_torchrec.checkpoint.save import save_checkpoint

__all__ = ["LoadReport", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]
