"""CCE (Clustered Compositional Embeddings) for TorchRec.

What a job needs is here, and is loaded when it is asked for: importing the package alone loads
neither torch nor TorchRec.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
"""The one place of it: pyproject.toml reads it from here, and tests compare the rest with it."""

if TYPE_CHECKING:  # what `__getattr__` finds, for type checkers and editors
    from cce_torchrec.checkpoint import (  # fmt: skip
        CheckpointInfo,
        LoadReport,
        TrainingProgress,
        checkpoint_info,
        latest_checkpoint,
        load_checkpoint,
        save_checkpoint,
    )
    from cce_torchrec.clustering import (  # fmt: skip
        ChunkReport,
        ClusteringReport,
        ClusteringSchedule,
        cluster,
        finalize,
    )
    from cce_torchrec.config import CCEEmbeddingBagConfig
    from cce_torchrec.data import even_batches
    from cce_torchrec.distributed.process_group import end_process_group, start_process_group
    from cce_torchrec.distributed.sharders import get_default_sharders, register_sharders
    from cce_torchrec.joint import joint_table
    from cce_torchrec.modules.compress import compress_model
    from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
    from cce_torchrec.modules.embedding_collection import CCEEmbeddingCollection
    from cce_torchrec.planning import (  # fmt: skip
        advise,
        id_counts,
        make_plan,
        plan_report,
        tables_for_memory,
    )

_MODULES = {
    "config": ["CCEEmbeddingBagConfig"],
    "joint": ["joint_table"],
    "modules.embedding_bag_collection": ["CCEEmbeddingBagCollection"],
    "modules.embedding_collection": ["CCEEmbeddingCollection"],
    "modules.compress": ["compress_model"],
    "distributed.sharders": ["get_default_sharders", "register_sharders"],
    "distributed.process_group": ["end_process_group", "start_process_group"],
    "data": ["even_batches"],
    "planning": ["advise", "id_counts", "make_plan", "plan_report", "tables_for_memory"],
    "clustering": ["ChunkReport", "ClusteringReport", "ClusteringSchedule", "cluster", "finalize"],
    "checkpoint": [
        "CheckpointInfo",
        "LoadReport",
        "TrainingProgress",
        "checkpoint_info",
        "latest_checkpoint",
        "load_checkpoint",
        "save_checkpoint",
    ],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CCEEmbeddingBagCollection",
    "CCEEmbeddingBagConfig",
    "CCEEmbeddingCollection",
    "CheckpointInfo",
    "ChunkReport",
    "ClusteringReport",
    "ClusteringSchedule",
    "LoadReport",
    "TrainingProgress",
    "advise",
    "checkpoint_info",
    "cluster",
    "compress_model",
    "end_process_group",
    "even_batches",
    "finalize",
    "get_default_sharders",
    "id_counts",
    "joint_table",
    "latest_checkpoint",
    "load_checkpoint",
    "make_plan",
    "plan_report",
    "register_sharders",
    "save_checkpoint",
    "start_process_group",
    "tables_for_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
