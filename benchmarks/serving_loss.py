"""`python -m benchmarks.serving_loss --data FOLDER [--json FILE]`: log loss after training is over.

The training program trains GMF on MovieLens-1M and DLRM on flight records; the checkpoint is loaded
into the unsharded model, packed by rows of every type, and evaluated on the held-out rows. Then
full tables are trained, and packed likewise; imported by `import_table` with several numbers of
rows, and evaluated, and again after a pass of training on from there. Beside them are the errors of
FAISS's product quantiser with as many chunks and bits, and of its optimised one, which turns the
vectors first.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import nn

from benchmarks.machine import device_name
from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    data,
    load_checkpoint,
)
from cce_torchrec.clustering import import_table
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
FULL_RUNS = {
    "ml-1m": [*RUNS["ml-1m"], "--method", "full"],
    # They overfit in a second epoch.
    "flights": ["--dataset", "flights", "--epochs", "1", "--method", "full"],
}
RATE = 1e-3
"""Of Adam, for the pass after an import; not tuned."""
ROWS = (16, 64, 256, 1024)
"""Of a chunk, for imported tables."""


def trained(arguments: Sequence[str]) -> tuple[Trainer, nn.Module]:
    """A run of the program, and its model with the tables unsharded."""
    with tempfile.TemporaryDirectory() as folder:
        return _trained(arguments, Path(folder))


def _trained(arguments: Sequence[str], out: Path) -> tuple[Trainer, nn.Module]:
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


def imported(model: nn.Module, trainer: Trainer, rows: int) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of `model`, of full tables, with those to be compressed imported; and its figures."""
    (old,) = [m for m in model.modules() if isinstance(m, CCEEmbeddingBagCollection)]
    full = {config.name: config for config in old.embedding_bag_configs()}
    compressed = [name for name in full if name in trainer.dataset.compressed]
    tables = [
        CCEEmbeddingBagConfig(
            name=name, num_embeddings=config.num_embeddings, embedding_dim=config.embedding_dim,
            feature_names=config.feature_names, num_rows=rows, num_helper_rows=0,
        )
        if name in compressed
        else config
        for name, config in full.items()
    ]  # fmt: skip
    new = CCEEmbeddingBagCollection(tables)
    errors: dict[str, list[float]] = {"ours": [], "FAISS PQ": [], "FAISS OPQ": []}
    nbytes = 0
    for name in full:
        weight = old.embedding_bags[name].weight.detach()
        if name not in compressed:
            new.embedding_bags[name].weight.data.copy_(weight)
            continue
        report = import_table(new, name, weight, samples_per_centroid=None)
        nbytes += report.table_bytes
        errors["ours"].append(report.error)
        for kind, transform in (("FAISS PQ", False), ("FAISS OPQ", True)):
            errors[kind].append(quantizer_error(weight.numpy(), rows, transform))
    out = copy.deepcopy(model, {id(old): new})
    return out, {"bytes": nbytes} | {kind: statistics.fmean(own) for kind, own in errors.items()}


def trained_on(model: nn.Module, trainer: Trainer) -> nn.Module:
    """A copy of `model` after one more pass over the training rows, of network and tables."""
    own = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(own.parameters(), lr=RATE)
    share = data.Share(batch_size=2048, rank=0, world_size=1)
    for rows in trainer.dataset.batches(share, seed=0, epoch=trainer.args.epochs):
        logits = own(rows.dense, keyed_jagged(rows, trainer.features))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, rows.labels.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return own.eval()


def packed_losses(
    name: str, kind: str, model: nn.Module, trainer: Trainer
) -> tuple[float, list[dict[str, Any]]]:
    """The log loss of `model`, and of its tables packed by rows of every type; prints them."""
    base, base_auc = evaluated(model, trainer)
    print(f"| {name} | {kind}, trained | {base:.5f} | | {base_auc:.5f} | |", flush=True)
    rows = []
    for data_type in ROW_TYPES:
        served = inference_model(model, data_type=data_type)
        loss, area = evaluated(served, trainer)
        packed = next(m.packed for m in served.modules() if hasattr(m, "packed"))
        nbytes = packed.codes.numel() + packed.rows.numel()
        rows.append(
            {"data": name, "tables": kind, "data_type": data_type, "log_loss": loss,
             "trained": base, "auc": area, "trained_auc": base_auc, "bytes": nbytes}
        )  # fmt: skip
        cells = [name, f"{kind}, {data_type}", f"{loss:.5f}", f"{loss - base:+.5f}", f"{area:.5f}"]
        print(f"| {' | '.join(cells)} | {nbytes:,} |", flush=True)
    return base, rows


def quantizer_error(weight: np.ndarray, rows: int, turned: bool) -> float:
    """Relative squared error of FAISS's product quantiser of 4 chunks, after OPQ if `turned`."""
    chunks = 4
    own = np.ascontiguousarray(weight)
    if turned:
        matrix = faiss.OPQMatrix(own.shape[1], chunks)
        matrix.pq = faiss.ProductQuantizer(own.shape[1], chunks, rows.bit_length() - 1)
        matrix.train(own)
        own = matrix.apply(own)
    quantizer = faiss.ProductQuantizer(own.shape[1], chunks, rows.bit_length() - 1)
    quantizer.train(own)
    off = quantizer.decode(quantizer.compute_codes(own)) - own
    return float((off**2).sum() / (own**2).sum())


def curve_point(name: str, model: nn.Module, trainer: Trainer, rows: int) -> dict[str, Any]:
    """Full tables imported with `rows` rows a chunk: losses, bytes and errors."""
    made, found = imported(model, trainer, rows)
    loss, area = evaluated(made, trainer)
    on, on_area = evaluated(trained_on(made, trainer), trainer)
    point = {"data": name, "rows": rows, "log_loss": loss, "auc": area}
    return point | {"log_loss_trained_on": on, "auc_trained_on": on_area} | found


def _with_data(arguments: Sequence[str], name: str, folder: Path) -> list[str]:
    return [*arguments, "--data", str(folder / name)] if name == "ml-1m" else list(arguments)


def main() -> None:
    """Prints a table and writes --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with ml-1m/")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, curves = [], []
    header = "| data | tables | log loss | minus the trained model's | AUC | bytes |"
    print(f"{header}\n| --- | --- | --- | --- | --- | --- |")
    for name, arguments in RUNS.items():
        trainer, model = trained(_with_data(arguments, name, args.data))
        rows += packed_losses(name, "CCE", model, trainer)[1]
    for name, arguments in FULL_RUNS.items():
        trainer, model = trained(_with_data(arguments, name, args.data))
        base, found = packed_losses(name, "full", model, trainer)
        rows += found
        for rows_of_chunk in ROWS:
            curves.append(curve_point(name, model, trainer, rows_of_chunk) | {"full": base})
            shown = {k: v for k, v in curves[-1].items() if k != "data"}
            print(f"{name}, imported: {shown}", flush=True)
    if args.json:
        result = {
            "device": device_name(torch.device("cpu")),
            "versions": installed_versions(),
            "settings": {"runs": RUNS, "full_runs": FULL_RUNS, "seed": 0, "rate_trained_on": RATE},
            "rows": rows,
            "imported": curves,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
