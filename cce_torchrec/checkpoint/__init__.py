"""Checkpoints of whole training jobs, written so that a kill leaves the previous one loadable."""

from cce_torchrec.versions import check_installation

check_installation()  # before TorchRec is loaded, whose errors do not say what to do

from cce_torchrec.checkpoint.compress_like import compress_like  # noqa: E402
from cce_torchrec.checkpoint.folder import latest_checkpoint  # noqa: E402
from cce_torchrec.checkpoint.full_table import full_table  # noqa: E402
from cce_torchrec.checkpoint.info import CheckpointInfo, checkpoint_info  # noqa: E402
from cce_torchrec.checkpoint.load import load_checkpoint  # noqa: E402
from cce_torchrec.checkpoint.load_report import LoadReport  # noqa: E402
from cce_torchrec.checkpoint.pending import PendingCheckpoint  # noqa: E402
from cce_torchrec.checkpoint.progress import TrainingProgress  # noqa: E402
from cce_torchrec.checkpoint.save import save_checkpoint  # noqa: E402

__all__ = [
    "CheckpointInfo",
    "LoadReport",
    "PendingCheckpoint",
    "TrainingProgress",
    "checkpoint_info",
    "compress_like",
    "full_table",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
