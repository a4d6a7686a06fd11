"""`torchrun ... -m cce_torchrec.train`: train DLRM or GMF with full or compressed tables."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from tqdm import tqdm

from cce_torchrec.clustering import ClusteringReport, ClusteringSchedule, cluster, finalize
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.distributed.embedding_bag_collection import (
    ShardedCCEEmbeddingBagCollection,
    get_default_sharders,
)
from cce_torchrec.metrics import auc, log_loss
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.planner import make_plan
from cce_torchrec.train import data, options
from cce_torchrec.train.model import GMF, DLRMLogits, keyed_jagged, tables
from cce_torchrec.versions import installed_versions

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


def main(argv: list[str] | None = None) -> None:
    """Runs the program; under torchrun with its ranks, otherwise as one."""
    args = options.parse(argv)
    device = _start_ranks()
    try:
        Trainer(args, device).run()
    except ValueError as error:
        sys.exit(f"error: {error}")
    finally:
        dist.destroy_process_group()


def _start_ranks() -> torch.device:
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


class Trainer:
    """One run: the model, its data, and what it writes to --out."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.dataset = data.load(args.dataset, args.data, args.model, args.split_seed)
        rows = options.rows_per_table(args, self.dataset)
        options.set_defaults(args, self.dataset, rows)
        torch.manual_seed(args.seed)
        # A dot product of embeddings near zero has no gradient; DLRM's dense part has its own.
        init_bound = args.embedding_dim**-0.5 if args.model == "gmf" else None
        self.configs = tables(
            self.dataset,
            args.method,
            args.embedding_dim,
            args.num_chunks,
            rows,
            args.seed,
            init_bound,
        )
        self.model, self.optimizer = self._build()
        self.features = list(self.dataset.features)
        self.clustering = ClusteringReport()
        self.clustering_seconds = 0.0

    def _build(self) -> tuple[DistributedModelParallel, torch.optim.Optimizer | None]:
        args = self.args
        collection = CCEEmbeddingBagCollection(self.configs, device=torch.device("meta"))
        apply_optimizer_in_backward(
            OPTIMIZERS[args.optimizer], collection.parameters(), {"lr": args.lr}
        )
        model: nn.Module
        if args.model == "gmf":
            model = GMF(collection)
        else:
            dense_features = self.dataset.train.dense.shape[1]
            model = DLRMLogits(collection, dense_features, args.embedding_dim)
        plan = make_plan(model, self.configs, self.device, args.plan, args.batch_size)
        torch.manual_seed(args.seed + 1 + self.rank)  # tables differ by rank, DDP syncs the rest
        sharded = DistributedModelParallel(
            model, device=self.device, plan=plan, sharders=get_default_sharders()
        )
        dense = [
            parameter
            for name, parameter in sharded.named_parameters()
            if "embedding_bag_collection" not in name.split("sparse_arch")[-1]
        ]
        return sharded, torch.optim.Adam(dense, lr=args.dense_lr) if dense else None

    def run(self) -> None:
        """Trains, evaluates every epoch, and writes metrics.jsonl and summary.json."""
        args, train = self.args, self.dataset.train
        steps = max(1, len(train) // args.batch_size)
        schedule = ClusteringSchedule.evenly(steps * args.epochs, args.clusterings)
        if self.rank == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "metrics.jsonl").write_text("")
        history: list[dict[str, Any]] = []
        train_seconds = 0.0
        for epoch in range(1, args.epochs + 1):
            began = time.perf_counter()
            loss = self._train_epoch(epoch, steps, schedule)
            seconds = time.perf_counter() - began
            train_seconds += seconds
            val_log_loss, val_auc = self._evaluate()
            history.append(
                {
                    "epoch": epoch,
                    "train_loss": loss,
                    "val_log_loss": val_log_loss,
                    "val_auc": val_auc,
                    "seconds": seconds,
                }
            )
            self._say_epoch(history[-1])
        if self.rank == 0:
            examples = steps * min(args.batch_size, len(train)) * args.epochs
            self.configs = next(
                m.embedding_bag_configs()
                for m in self.model.modules()
                if isinstance(m, ShardedCCEEmbeddingBagCollection)
            )
            self._write_summary(history, examples / train_seconds)

    def _train_epoch(self, epoch: int, steps: int, schedule: ClusteringSchedule) -> float:
        args, train = self.args, self.dataset.train
        self.model.train()
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
        order = torch.randperm(len(train), generator=generator)
        bar = tqdm(
            total=steps,
            desc=f"epoch {epoch}",
            leave=False,
            disable=self.rank != 0 or not sys.stderr.isatty(),
        )
        total = torch.zeros((), device=self.device)
        for step in range(steps):
            batch = order[step * args.batch_size : (step + 1) * args.batch_size]
            logits, labels = self._forward(
                train.take(batch.tensor_split(self.world_size)[self.rank])
            )
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
            if self.optimizer is not None:
                self.optimizer.zero_grad()
            loss.backward()
            if self.optimizer is not None:
                self.optimizer.step()
            total += loss.detach()
            bar.update()
            if schedule.due((epoch - 1) * steps + step + 1):
                last = (epoch - 1) * steps + step + 1 == max(schedule.steps)
                self.clustering = (finalize if args.finalize and last else cluster)(self.model)
                self.clustering_seconds += self.clustering.seconds
        bar.close()
        dist.all_reduce(total)
        return float(total) / (steps * self.world_size)

    def _forward(self, rows: data.Rows) -> tuple[torch.Tensor, torch.Tensor]:
        rows = data.Rows(*(t.to(self.device) for t in (rows.dense, rows.ids, rows.labels)))
        return self.model(rows.dense, keyed_jagged(rows, self.features)), rows.labels

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        self.model.eval()
        rows = self.dataset.validation
        outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for batch in torch.arange(len(rows)).split(self.args.batch_size):
            mine = rows.take(batch.tensor_split(self.world_size)[self.rank])
            logits, labels = self._forward(mine)
            outputs.append((logits.cpu(), labels.cpu()))
        local = tuple(torch.cat(part) for part in zip(*outputs, strict=True))
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, local)
        logits, labels = (torch.cat(part) for part in zip(*gathered, strict=True))
        return log_loss(logits, labels), auc(logits, labels)

    def _say_epoch(self, metrics: dict[str, Any]) -> None:
        if self.rank != 0:
            return
        print(
            "epoch {epoch}: train loss {train_loss:.4f}, validation log loss {val_log_loss:.4f}, "
            "AUC {val_auc:.4f}, {seconds:.1f} s".format(**metrics),
            flush=True,
        )
        with (self.args.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def _write_summary(self, history: list[dict[str, Any]], examples_per_second: float) -> None:
        args, configs = self.args, self.configs
        full = sum(c.num_embeddings * c.embedding_dim for c in configs)
        parameters = sum(
            c.num_parameters
            if isinstance(c, CCEEmbeddingBagConfig)
            else c.num_embeddings * c.embedding_dim
            for c in configs
        )
        table_bytes = sum(
            c.table_bytes
            if isinstance(c, CCEEmbeddingBagConfig)
            else 4 * c.num_embeddings * c.embedding_dim
            for c in configs
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
            "examples_per_second": examples_per_second,
            "clustering_seconds": self.clustering_seconds,
            "seconds": sum(h["seconds"] for h in history),
            "last_clustering": [asdict(chunk) for chunk in self.clustering.chunks],
            "world_size": self.world_size,
            "device": str(self.device),
            "settings": {k: str(v) if k == "out" else v for k, v in vars(args).items()},
            "versions": installed_versions(),
        }
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(
            f"best validation log loss {summary['best_val_log_loss']:.4f}, "
            f"AUC {summary['best_val_auc']:.4f}; {parameters:,} table parameters, "
            f"{table_bytes:,} table bytes ({summary['compression_ratio']:.1f}x smaller than full); "
            f"{args.out / 'summary.json'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
