"""tests/support/plain_job.py with the lines of docs/adopt_program.md, which a test compares."""

import argparse
import itertools
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.datasets.random import RandomRecDataset
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

import cce_torchrec
from cce_torchrec import end_process_group

FEATURES = {"user": 20_000, "item": 17_000, "city": 9_000}
"""Ids of each; compress_model takes tables of a MiB or more."""
DENSE, DIM = 3, 16
CPU = torch.device("cpu")


def parse_args(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batches", type=int, default=12, help="of an epoch, on the first rank")
    parser.add_argument("--more_batches", type=int, default=0, help="of each rank after it")
    parser.add_argument("--limit_train_batches", type=int)
    parser.add_argument("--adagrad", action="store_true")
    parser.add_argument("--save_dir", required=True, help="folder of the checkpoints")
    return parser.parse_args(argv)


class ClickModel(nn.Module):
    """A loss, and what it is of, as TorchRec's pipelines want it."""

    def __init__(self, tables):
        super().__init__()
        self.tables = tables
        self.over = nn.Sequential(
            nn.Linear(DENSE + DIM * len(FEATURES), 16), nn.ReLU(), nn.Linear(16, 1)
        )

    def forward(self, batch):
        embeddings = self.tables(batch.sparse_features).values()
        logits = self.over(torch.cat([batch.dense_features, embeddings], 1)).squeeze(1)
        labels = batch.labels.float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return loss, (logits.detach(), batch.labels)


def dataloader(batches, seed):
    dataset = RandomRecDataset(
        keys=list(FEATURES),
        batch_size=32,
        hash_sizes=list(FEATURES.values()),
        ids_per_feature=2,
        num_dense=DENSE,
        manual_seed=seed,
        num_batches=batches,
    )
    # Its own generator: it draws from torch's whenever it is iterated, also after a restart.
    return DataLoader(dataset, batch_size=None, generator=torch.Generator())


def print_first(line):
    if dist.get_rank() == 0:
        print(line, flush=True)


def evaluate(pipeline, eval_dataloader):
    pipeline._model.eval()
    outputs = []
    iterator = iter(eval_dataloader)
    with torch.no_grad():
        while True:
            try:
                outputs.append(pipeline.progress(iterator))
            except StopIteration:
                break
    logits, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    total = binary_auroc(logits, labels)
    dist.all_reduce(total)
    print_first(f"AUROC {total / dist.get_world_size():.6f}")


def train(
    progress: cce_torchrec.TrainingProgress,
    pipeline,
    train_dataloader,
    lr_scheduler,
    limit_train_batches,
):
    pipeline._model.train()
    batches = cce_torchrec.even_batches(train_dataloader)
    iterator = itertools.islice(batches, progress.step_in_epoch, limit_train_batches)
    start_it = progress.step_in_epoch
    for it in itertools.count(start_it):
        try:
            pipeline.progress(iterator)
            lr_scheduler.step()
            progress.advance()
        except StopIteration:
            print_first(f"steps {it}")
            break


def train_and_evaluate(args, model, optimizer, train_dataloader, eval_dataloader, lr_scheduler):
    pipeline = TrainPipelineSparseDist(model, optimizer, CPU, execute_all_batches=True)
    steps = min(len(train_dataloader), args.limit_train_batches or sys.maxsize)
    progress = cce_torchrec.TrainingProgress(
        args.save_dir, model, [optimizer], [lr_scheduler], epochs=args.epochs, steps_per_epoch=steps
    )
    for epoch in range(progress.epoch, args.epochs):
        print_first(f"epoch {epoch}")
        train(
            progress,
            pipeline,
            train_dataloader,
            lr_scheduler,
            args.limit_train_batches,
        )
        evaluate(pipeline, eval_dataloader)
    evaluate(pipeline, eval_dataloader)


def run(args):
    rank = dist.get_rank()
    train_dataloader = dataloader(args.batches + rank * args.more_batches, rank)
    eval_dataloader = dataloader(4, 100 + rank)
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=ids, embedding_dim=DIM, feature_names=[name])
        for name, ids in FEATURES.items()
    ]
    train_model = ClickModel(EmbeddingBagCollection(tables, device=torch.device("meta")))
    cce_torchrec.compress_model(train_model, compression=20)
    cce_torchrec.register_sharders()
    embedding_optimizer = torch.optim.Adagrad if args.adagrad else torch.optim.SGD
    apply_optimizer_in_backward(embedding_optimizer, train_model.tables.parameters(), {"lr": 0.1})
    model = DistributedModelParallel(train_model, device=CPU)
    dense_optimizer = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )
    optimizer = CombinedOptimizer([model.fused_optimizer, dense_optimizer])
    lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 15], gamma=0.5)
    train_and_evaluate(args, model, optimizer, train_dataloader, eval_dataloader, lr_scheduler)


def main(argv):
    args = parse_args(argv)
    torch.manual_seed(1)
    dist.init_process_group("gloo")
    run(args)
    end_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
