"""Scalars for TensorBoard: the numbers of metrics.jsonl under names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cce_torchrec.checkpoint.location import store_of
from cce_torchrec.extras import load_extra

_ASIDE = ("kind", "step", "epoch")
_CHUNK_ASIDE = ("table", "chunk", "ids")


class Board:
    """Writes lines of metrics.jsonl to the folder `tensorboard` of a run.

    Args:
        out: folder of the run.
        step: that it goes on from; what was written of later ones is taken back.
    """

    def __init__(self, out: Path, step: int) -> None:
        writer = load_extra("torch.utils.tensorboard", "tensorboard", "--tensorboard").SummaryWriter
        self._writer = writer(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def add(self, line: dict[str, Any]) -> None:
        """Writes the numbers of one line."""
        if line["step"] is None:  # of an epoch before a restart that knew no steps
            return
        for name, value in scalars(line):
            self._writer.add_scalar(name, value, line["step"])
        if line["kind"] != "train":
            self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def check_board(out: Path) -> None:
    """Refuses what would fail when training starts.

    Raises:
        MissingExtra: TensorBoard is not installed.
        ValueError: `out` is in an object store.
    """
    load_extra("torch.utils.tensorboard", "tensorboard", "--tensorboard")
    if store_of(out) is not None:
        raise ValueError(
            f"--tensorboard writes files as it goes, which {out} does not take; leave it out, or "
            "give --out a local folder"
        )


def scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values of a line: train/loss, train/memory/0, clustering/TABLE/changed, ..."""
    kind = line["kind"]
    for key, value in line.items():
        if key in _ASIDE or key == "chunks":
            continue
        if key.endswith("_per_rank") or key == "memory":
            for rank, own in enumerate(value):
                yield f"{kind}/{key}/{rank}", own
        elif isinstance(value, dict):
            for name, own in value.items():
                yield f"{kind}/{key}/{name}", own
        elif isinstance(value, int | float):
            yield f"{kind}/{key}", value
    yield from _of_tables(line.get("chunks", []))


def _of_tables(chunks: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Of each table what its chunks say: sums, and means of shares and imbalance."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for chunk in chunks:
        tables.setdefault(chunk["table"], []).append(chunk)
    for table, own in tables.items():
        for key in own[0].keys() - set(_CHUNK_ASIDE):
            values = [chunk[key] for chunk in own if chunk[key] is not None]
            if values:
                total = sum(values)
                mean = key in ("changed", "imbalance")
                yield f"clustering/{table}/{key}", total / len(values) if mean else total
