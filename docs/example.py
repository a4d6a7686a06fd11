"""A whole job: `torchrun --nproc-per-node 2 docs/example.py [folder]`.

On CPUs (gloo) or one GPU a rank (nccl). Whether a user likes a country depends on the user's group,
which is not an input: clustering may find it. The last lines print the loss on fresh examples.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from cce_torchrec.checkpoint import save_checkpoint
from cce_torchrec.clustering import ClusteringSchedule
from cce_torchrec.distributed.process_group import end_process_group
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan

USERS, COUNTRIES, DIM, STEPS, BATCH_SIZE = 5_000, 50, 16, 400, 2048
EPOCHS = 5  # of 80 steps, in which a user comes 33 times


class Model(nn.Module):
    """The logit of (user, country)."""

    def __init__(self, collection: CCEEmbeddingBagCollection) -> None:
        super().__init__()
        self.tables = collection
        self.over = nn.Sequential(nn.Linear(2 * DIM, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.over(self.tables(features).values()).squeeze(1)


def batch(size: int, device: torch.device) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """Features and labels of `size` examples; the truth behind them is the same on every rank."""
    truth = torch.Generator().manual_seed(1)
    groups = torch.randint(8, (USERS,), generator=truth)
    tastes, offers = (torch.randn(n, 2, generator=truth) for n in (8, COUNTRIES))
    likes = (tastes @ offers.T > 0).float()
    users, countries = torch.randint(USERS, (size,)), torch.randint(COUNTRIES, (size,))
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=["user", "country"],
        values=torch.cat([users, countries]),
        lengths=torch.ones(2 * size, dtype=torch.int32),
    )
    return features.to(device), likes[groups[users], countries].to(device)


def main(folder: str) -> None:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)

    collection = CCEEmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            CCEEmbeddingBagConfig(
                name="user",
                num_embeddings=USERS,
                embedding_dim=DIM,
                feature_names=["user"],
                num_chunks=4,
                num_rows=64,
            ),
            EmbeddingBagConfig(
                name="country",
                num_embeddings=COUNTRIES,
                embedding_dim=DIM,
                feature_names=["country"],
            ),  # plain tables stay plain
        ],
    )
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.1})
    tables = collection.embedding_bag_configs()
    model = Model(collection)
    plan = make_plan(
        model, tables, device, "auto", batch_size=BATCH_SIZE
    )  # the batch of all ranks together
    model = DistributedModelParallel(
        model, device=device, plan=plan, sharders=get_default_sharders()
    )
    dense = torch.optim.Adam(
        [p for _, p in in_backward_optimizer_filter(model.named_parameters())], lr=1e-2
    )

    loss_of = nn.functional.binary_cross_entropy_with_logits
    schedule = ClusteringSchedule.for_tables(tables, EPOCHS, STEPS // EPOCHS, finalize=True)
    for step in range(1, STEPS + 1):
        features, labels = batch(BATCH_SIZE // ranks, device)
        dense.zero_grad()
        loss_of(model(features), labels).backward()  # steps the tables too
        dense.step()
        schedule.cluster_if_due(model, step)  # collective, as is saving: on every rank
    save_checkpoint(folder, model, step=STEPS, optimizers=[dense], schedule=schedule)

    features, labels = batch(8192, device)
    with torch.no_grad():
        logits = model(features)
    mean = labels.mean()
    told = torch.stack([loss_of(logits, labels), loss_of(mean.logit().expand_as(labels), labels)])
    dist.all_reduce(told)
    if rank == 0:
        trained, constant = (told / ranks).tolist()
        print(f"log loss {trained:.3f}, of predicting the mean {constant:.3f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/example")
    end_process_group()  # with the model out of scope
