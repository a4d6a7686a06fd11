"""`python -m benchmarks.serving_loss --data FOLDER [--json FILE]`: what packing costs in log loss.

The training program trains GMF on MovieLens-1M and DLRM on flight records; the checkpoint is loaded
into the unsharded model, packed by rows of every type, and evaluated on the held-out rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from benchmarks.machine import device_name
from cce_torchrec import CCEEmbeddingBagCollection, data, load_checkpoint
from cce_torchrec.distributed.process_group import end_process_group
from cce_torchrec.inference import inference_model
from cce_torchrec.inference.row_types import ROW_TYPES
from cce_torchrec.metrics import auc, log_loss
from cce_torchrec.train import options
from cce_torchrec.train.job import WithLoss
from cce_torchrec.train.model import GMF, DLRMLogits, keyed_jagged
from cce_torchrec.train.run import start_ranks
from cce_torchrec.train.trainer import Trainer
from cce_torchrec.versions import installed_versions

RUNS = {
    "ml-1m": ["--model", "gmf", "--dataset", "ml-1m", "--embedding-dim", "32"],
    "flights": ["--dataset", "flights", "--epochs", "2", "--compression", "20"],
}
"""What the program is told."""


def trained(arguments: Sequence[str], out: Path) -> tuple[Trainer, nn.Module]:
    """A run of the program, and its model with the tables unsharded."""
    args = options.parse([*arguments, "--out", str(out), "--checkpoint-every", str(10**9)])
    device = start_ranks(timedelta(minutes=10))
    try:
        trainer = Trainer(args, device)
        trainer.run()
        collection = CCEEmbeddingBagCollection(trainer.configs())
        logits = (
            GMF(collection)
            if args.model == "gmf"
            else DLRMLogits(collection, trainer.dataset.num_dense, args.embedding_dim)
        )
        model = WithLoss(logits)
        load_checkpoint(out / "checkpoints", model)
    finally:
        end_process_group()
    return trainer, model.logits.eval()


@torch.no_grad()
def evaluated(model: Callable[..., torch.Tensor], trainer: Trainer) -> tuple[float, float]:
    """Log loss and AUC on the held-out rows."""
    share = data.Share(batch_size=4096, rank=0, world_size=1)
    found = [
        (model(rows.dense, keyed_jagged(rows, trainer.features)), rows.labels)
        for rows in trainer.dataset.validation_batches(share)
    ]
    logits, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return log_loss(logits, labels), auc(logits, labels)


def main() -> None:
    """Prints a table and writes --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with ml-1m/")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| data | rows | log loss | minus the trained model's | AUC | bytes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, arguments in RUNS.items():
        own = [*arguments, "--data", str(args.data / name)] if name == "ml-1m" else arguments
        with tempfile.TemporaryDirectory() as folder:
            trainer, model = trained(own, Path(folder))
        base, base_auc = evaluated(model, trainer)
        print(f"| {name} | trained | {base:.5f} | | {base_auc:.5f} | |", flush=True)
        for data_type in ROW_TYPES:
            served = inference_model(model, data_type=data_type)
            loss, area = evaluated(served, trainer)
            packed = next(m.packed for m in served.modules() if hasattr(m, "packed"))
            nbytes = packed.codes.numel() + packed.rows.numel()
            rows.append(
                {"data": name, "data_type": data_type, "log_loss": loss, "trained": base,
                 "auc": area, "trained_auc": base_auc, "bytes": nbytes}
            )  # fmt: skip
            cells = [name, data_type, f"{loss:.5f}", f"{loss - base:+.5f}", f"{area:.5f}"]
            print(f"| {' | '.join(cells)} | {nbytes:,} |", flush=True)
    if args.json:
        result = {
            "device": device_name(torch.device("cpu")),
            "versions": installed_versions(),
            "settings": {"runs": RUNS, "seed": 0},
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
