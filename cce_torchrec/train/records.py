"""What a run measures and writes: metrics.jsonl, a line per epoch, and summary.json."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.checkpoint.location import make_folder, write_whole
from cce_torchrec.clustering import ClusteringReport
from cce_torchrec.config import is_cce
from cce_torchrec.versions import installed_versions


@dataclass
class Records:
    """Measurements so far; part of a checkpoint, so that a resumed run writes each line once."""

    history: list[dict[str, Any]] = field(default_factory=list)
    """Per epoch: epoch, train_loss, val_log_loss, val_auc, seconds."""
    epoch_seconds: float = 0.0
    """Of the running epoch, before a restart."""
    clustering_seconds: float = 0.0
    last_clustering: list[dict[str, Any]] = field(default_factory=list)

    def clustered(self, report: ClusteringReport) -> None:
        """Notes a clustering step."""
        self.clustering_seconds += report.seconds
        self.last_clustering = [asdict(chunk) for chunk in report.chunks]

    def write_metrics(self, out: Path) -> None:
        """metrics.jsonl, in whole, so that lines of a run that was killed do not stay."""
        make_folder(out)
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_whole(out / "metrics.jsonl", lines)

    def say_epoch(self) -> None:
        """Prints the last epoch."""
        print(
            "epoch {epoch}: train loss {train_loss:.4f}, validation log loss {val_log_loss:.4f}, "
            "AUC {val_auc:.4f}, {seconds:.1f} s".format(**self.history[-1]),
            flush=True,
        )

    def write_summary(
        self,
        args: argparse.Namespace,
        configs: Sequence[EmbeddingBagConfig],
        examples: int,
        world_size: int,
        device: str,
    ) -> None:
        """summary.json, and its essence on the terminal; `examples` were trained on in all."""
        history, seconds = self.history, sum(h["seconds"] for h in self.history)
        full = sum(c.num_embeddings * c.embedding_dim for c in configs)
        parameters = sum(
            c.num_parameters if is_cce(c) else c.num_embeddings * c.embedding_dim for c in configs
        )
        table_bytes = sum(
            c.table_bytes if is_cce(c) else 4 * c.num_embeddings * c.embedding_dim for c in configs
        )
        summary = {
            "val_log_loss": history[-1]["val_log_loss"],
            "val_auc": history[-1]["val_auc"],
            "best_val_log_loss": min(h["val_log_loss"] for h in history),
            "best_val_auc": max(h["val_auc"] for h in history),
            "parameters": parameters,
            "table_bytes": table_bytes,
            "compression_ratio": 4 * full / table_bytes,
            "parameter_ratio": full / parameters,
            "examples_per_second": examples / seconds,
            "clustering_seconds": self.clustering_seconds,
            "seconds": seconds,
            "last_clustering": self.last_clustering,
            "world_size": world_size,
            "device": device,
            # JSON has no paths.
            "settings": {k: str(v) if k == "out" else v for k, v in vars(args).items()},
            "versions": installed_versions(),
        }
        write_whole(args.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        print(
            f"best validation log loss {summary['best_val_log_loss']:.4f}, "
            f"AUC {summary['best_val_auc']:.4f}; {parameters:,} table parameters, "
            f"{table_bytes:,} table bytes ({summary['compression_ratio']:.1f}x smaller than full); "
            f"{args.out / 'summary.json'}",
            flush=True,
        )
