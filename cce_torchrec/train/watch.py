"""What a run tells while it is on: lines of metrics.jsonl, scalars of TensorBoard, a bar."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.optim.keyed import CombinedOptimizer

from cce_torchrec.bars import bar
from cce_torchrec.checkpoint.folder import read_manifest
from cce_torchrec.checkpoint.pending import PendingCheckpoint
from cce_torchrec.clustering import ClusteringReport
from cce_torchrec.train.board import Board
from cce_torchrec.train.meter import TrainMeter, rates
from cce_torchrec.train.records import Records
from cce_torchrec.train.validation import Score

_LEAST, _MOST, _ENOUGH = 25, 100, 16
"""Lines about training in a pass, by default: a line takes about a millisecond, which is nothing
beside 16 steps; short passes have fewer steps between lines, and long ones more."""


class Watch:
    """Takes what a run does, step by step, and writes what there is to tell.

    Args:
        args: options of the run.
        device: of this rank.
        records: what there is so far.
        steps: of a pass.
        step: steps that were done before.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        *,
        records: Records,
        steps: int,
        step: int,
    ) -> None:
        self.records = records
        self.meter = TrainMeter(device)
        self.step = step
        self.epoch = 1
        self._out: Path = args.out
        self._steps = steps
        self._every = args.log_every or max(-(-steps // _MOST), min(-(-steps // _LEAST), _ENOUGH))
        self._first = dist.get_rank() == 0
        self._began = time.perf_counter() - records.run_seconds
        self._board = Board(args.out, step) if args.tensorboard and self._first else None
        self._pending: list[tuple[int, PendingCheckpoint]] = []
        self._bar = bar(0, "", "step")
        self._bar.close()  # or those of the passes would be below it

    def begin_epoch(self, epoch: int) -> None:
        """Training of a pass begins, or goes on."""
        self.epoch = epoch
        done = self.step - (epoch - 1) * self._steps
        self._bar = bar(self._steps, f"epoch {epoch}", "step", initial=done)
        self.meter.start()

    def trained(self, output: tuple[torch.Tensor, ...], optimizer: CombinedOptimizer) -> None:
        """A step is done: its mean loss, logits and labels. Collective where a line is due."""
        self.step += 1
        self.meter.add(output)
        self._bar.update()
        if self.step % self._every == 0:
            self.train_line(optimizer)

    def train_line(self, optimizer: CombinedOptimizer) -> None:
        """Tells of the examples since the last line, if there are any. Collective."""
        if self.meter.empty:
            return
        line = self.meter.line() | {"rates": rates(optimizer), "seconds": self.seconds}
        self._bar.set_postfix_str(
            f"loss {line['loss']:.4f}, {line['examples_per_second']:,.0f} examples/s", refresh=False
        )
        self._tell("train", **line)
        self._tell_of_written()

    def end_epoch(self) -> None:
        """Training of a pass has ended."""
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Since the run began, those before a restart included."""
        return time.perf_counter() - self._began

    def validated(self, score: Score, seconds: float) -> None:
        """A validation took so many seconds."""
        found = {"log_loss": score.log_loss, "auc": score.auc, "examples": score.examples}
        self._tell("validation", **found, seconds=seconds)

    @property
    def last_validation(self) -> dict[str, Any] | None:
        """The line of a validation after this very step, if there was one."""
        for line in reversed(self.records.lines):
            if line["kind"] == "validation":
                return line if line["step"] == self.step else None
        return None

    def clustered(self, report: ClusteringReport) -> None:
        """A clustering step is done."""
        self._write(self.records.clustered(report, self.step))

    def saved(self, checkpoint: Path | PendingCheckpoint, seconds: float) -> None:
        """A checkpoint was written, or is being written by a thread."""
        if isinstance(checkpoint, PendingCheckpoint):
            self._pending.append((self.step, checkpoint))
        else:
            self._tell_of(checkpoint, self.step, seconds)

    def end(self) -> None:
        """The run has ended, and so has all that threads were writing."""
        self._tell_of_written()
        if self._board is not None:
            self._board.close()

    def _tell_of_written(self) -> None:
        """Tells of the checkpoints that a thread has written by now."""
        waiting, self._pending = self._pending, []
        for step, handle in waiting:
            if handle.written is None:  # or it has failed, which the next save raises on all ranks
                self._pending.append((step, handle))
            else:
                self._tell_of(handle.written[0], step, handle.written[1])

    def _tell_of(self, path: Path, step: int, seconds: float) -> None:
        if self._first:  # which alone reads the manifest, and keeps the records of a checkpoint
            size = read_manifest(path).total_bytes
            line = {"step": step, "seconds": seconds, "bytes": size, "path": str(path)}
            self._write(self.records.add("checkpoint", **line))

    def _tell(self, kind: str, **values: Any) -> None:
        where = {"step": self.step, "epoch": self.epoch}
        self._write(self.records.add(kind, **where, **values))

    def epoch_ended(self, values: dict[str, Any]) -> None:
        """A pass has ended: what its line says beside epoch and step."""
        self._write(self.records.add("epoch", epoch=self.epoch, step=self.step, **values))

    def _write(self, line: dict[str, Any]) -> None:
        if self._first:
            self.records.append_metrics(self._out, line)
            if self._board is not None:
                self._board.add(line)
