"""What a run measures and writes: metrics.jsonl, lines of several kinds, and summary.json."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.checkpoint.location import make_folder, store_of, write_whole
from cce_torchrec.clustering import ClusteringReport
from cce_torchrec.config import is_cce
from cce_torchrec.versions import installed_versions

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_CHUNK = ("table", "chunk", "ids", "objective_before", "objective_after", "empty_clusters",
          "dead_rows", "imbalance", "seconds")  # fmt: skip


@dataclass
class Records:
    """Measurements so far; part of a checkpoint, so that a resumed run writes each line once."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    """Of metrics.jsonl: each has a `kind`; docs/observing.md says what else."""
    epoch_seconds: float = 0.0
    """Of the running epoch, before a restart."""
    run_seconds: float = 0.0
    """Of the run, before a restart."""
    clustering_seconds: float = 0.0
    last_clustering: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def resumed(cls, saved: dict[str, Any]) -> Records:
        """The records of a checkpoint; those of older ones had a line an epoch and no kinds."""
        # The caller's own is part of a report that others may read.
        saved = dict(saved)
        for line in saved.pop("history", []):
            saved.setdefault("lines", []).append({"kind": "epoch", "step": None, **line})
        return cls(**saved)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of the epochs: epoch, step, train_loss, val_log_loss, val_auc, seconds."""
        return [line for line in self.lines if line["kind"] == "epoch"]

    def add(self, kind: str, **values: Any) -> dict[str, Any]:
        """Notes a line, with null for what is no number, and returns it."""
        self.lines.append(plain({"kind": kind, **values}))
        return self.lines[-1]

    def clustered(self, report: ClusteringReport, step: int) -> dict[str, Any]:
        """Notes a clustering step."""
        self.clustering_seconds += report.seconds
        # Whole, for summary.json; the line of metrics.jsonl has what curves are drawn of.
        latest = {(chunk["table"], chunk["chunk"]): chunk for chunk in self.last_clustering}
        latest |= {(chunk.table, chunk.chunk): plain(asdict(chunk)) for chunk in report.chunks}
        # Of every table its last one, as those of rare ids have steps of their own.
        self.last_clustering = list(latest.values())
        chunks = [
            {name: getattr(chunk, name) for name in _CHUNK} | {"changed": chunk.moved}
            for chunk in report.chunks
        ]
        return self.add(
            "clustering",
            step=step,
            objective_before=report.objective_before,
            objective_after=report.objective_after,
            changed=report.moved,
            empty_clusters=report.empty_clusters,
            dead_rows=report.dead_rows,
            imbalance=report.imbalance,
            seconds=report.seconds,
            chunks=chunks,
        )

    def write_metrics(self, out: Path) -> None:
        """metrics.jsonl, in whole, so that lines of a run that was killed do not stay."""
        make_folder(out)
        write_whole(out / METRICS, "".join(map(_text, self.lines)))

    def append_metrics(self, out: Path, line: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl, at once where that is a file.

        An object store has it, and a disk that was full for a while too, once the whole file is
        written: after each pass and each checkpoint.
        """
        if store_of(out) is not None:
            return
        try:
            with (out / METRICS).open("a") as file:
                file.write(_text(line))
        except OSError as error:  # other ranks do not wait here, and training need not end
            logger.warning("%s: a line was not written (%s)", out / METRICS, error)

    def keep_line_of(self, checkpoint: Path, out: Path) -> None:
        """Notes the line of the checkpoint that a run goes on from, which it cannot hold itself."""
        try:
            lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
        except (OSError, ValueError):  # a line that a kill has cut
            return
        self.lines += [
            line
            for line in lines
            if isinstance(line, dict)
            and line.get("kind") == "checkpoint"
            and line.get("path") == str(checkpoint)
        ]

    def say_epoch(self) -> None:
        """Prints the last epoch."""
        line = {k: math.nan if v is None else v for k, v in self.history[-1].items()}
        print(
            "epoch {epoch}: train loss {train_loss:.4f}, validation log loss {val_log_loss:.4f}, "
            "AUC {val_auc:.4f}, {seconds:.1f} s".format(**line),
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
        # Of float32, as the program makes no other tables.
        full = sum(c.num_embeddings * c.embedding_dim for c in configs)
        parameters = sum(
            c.num_parameters if is_cce(c) else c.num_embeddings * c.embedding_dim for c in configs
        )
        table_bytes = sum(
            c.table_bytes if is_cce(c) else 4 * c.num_embeddings * c.embedding_dim for c in configs
        )
        best_loss, best_auc = _best(history, "val_log_loss", min), _best(history, "val_auc", max)
        summary = {
            "val_log_loss": history[-1]["val_log_loss"],
            "val_auc": history[-1]["val_auc"],
            "best_val_log_loss": best_loss,
            "best_val_auc": best_auc,
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
            "settings": settings(args),
            "versions": installed_versions(),
        }
        write_whole(args.out / "summary.json", json.dumps(plain(summary), indent=1) + "\n")
        print(
            f"best validation log loss {best_loss:.4f}, "
            f"AUC {best_auc:.4f}; {parameters:,} table parameters, "
            f"{table_bytes:,} table bytes ({summary['compression_ratio']:.1f}x smaller than full); "
            f"{args.out / 'summary.json'}",
            flush=True,
        )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a run as JSON has them, which knows no paths."""
    kept = (str, int, float, bool, type(None))
    return {k: v if isinstance(v, kept) else str(v) for k, v in vars(args).items()}


def plain(value: Any) -> Any:
    """`value` with None for numbers that JSON does not have: NaN and infinite ones."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _best(history: list[dict[str, Any]], name: str, of: Callable[[list[float]], float]) -> float:
    """The best number that any epoch has; NaN if none has one."""
    return of([line[name] for line in history if line[name] is not None] or [math.nan])


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"
