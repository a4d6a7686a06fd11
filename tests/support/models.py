"""Small tables, batches and models that many tests are made of, and how they are sharded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torchrec
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.streamable import Pipelineable

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CCEEmbeddingCollection
from cce_torchrec.clustering import cluster
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.planning import make_plan

CPU = torch.device("cpu")
SUM, MEAN = PoolingType.SUM, PoolingType.MEAN
STRIDE = 6
KEYS = ["g", "h", "unused", "f"]
EXAMPLES = 5
"""Of `vbe_batch`."""
# FBGEMM's eps; TorchRec's own row-wise Adagrad has 1e-10, which shows in tiny gradients.
ROWWISE = (torchrec.optim.RowWiseAdagrad, {"lr": 0.1, "eps": 1e-8})
SGD = (torch.optim.SGD, {"lr": 0.1})


def tables(pooling):
    """A CCE table of wide rows, a plain one, and a CCE table of many rows."""
    return [
        CCEEmbeddingBagConfig(
            name="t", num_embeddings=300, embedding_dim=16, feature_names=["f", "g"], num_rows=5,
            pooling=pooling,
        ),
        EmbeddingBagConfig(
            name="p", num_embeddings=40, embedding_dim=8, feature_names=["h", "f"],
            pooling=PoolingType.SUM,
        ),
        CCEEmbeddingBagConfig(
            name="u", num_embeddings=1000, embedding_dim=8, feature_names=["h"], num_rows=300,
            num_chunks=2, pooling=pooling,
        ),
    ]  # fmt: skip


def batch(seed, weighted, keys=KEYS):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(keys) * STRIDE,), generator=g)
    total = int(lengths.sum())
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.randint(0, 40, (total,), generator=g),
        lengths=lengths,
        weights=torch.rand(total, generator=g) if weighted else None,
        stride=STRIDE,
    )


def vbe_batch(seed, weighted):
    """Bags of each feature, fewer or more than the examples; KEYS in another order inside."""
    g = torch.Generator().manual_seed(seed)
    keys = KEYS[::-1]
    sizes = [int(n) for n in torch.randint(1, 2 * EXAMPLES, (len(keys),), generator=g)]
    lengths = torch.randint(0, 4, (sum(sizes),), generator=g)
    total = int(lengths.sum())
    rows = torch.stack([torch.randint(0, n, (EXAMPLES,), generator=g) for n in sizes])
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.randint(0, 40, (total,), generator=g),
        lengths=lengths,
        weights=torch.rand(total, generator=g) if weighted else None,
        stride_per_key_per_rank=[[n] for n in sizes],
        inverse_indices=(KEYS, rows.flip(0)),
    )


def every_example(kjt):
    """The same batch with each example's bag written out."""
    names, inverse = kjt.inverse_indices()
    values, lengths, weights = [], [], []
    for key, jagged in kjt.to_dict().items():
        for bag in inverse[names.index(key)].tolist():
            start, end = jagged.offsets()[bag : bag + 2].tolist()
            values.append(jagged.values()[start:end])
            lengths.append(end - start)
            if jagged.weights_or_none() is not None:
                weights.append(jagged.weights()[start:end])
    return KeyedJaggedTensor(
        keys=kjt.keys(),
        values=torch.cat(values),
        lengths=torch.tensor(lengths),
        weights=torch.cat(weights) if weights else None,
        stride=EXAMPLES,
    )


@dataclass
class Batch(Pipelineable):
    """What TorchRec's pipelines take."""

    ids: KeyedJaggedTensor

    def to(self, device, non_blocking=False):
        return Batch(self.ids.to(device, non_blocking=non_blocking))

    def record_stream(self, stream):
        self.ids.record_stream(stream)

    def pin_memory(self):
        return Batch(self.ids.pin_memory())


class Model(nn.Module):
    """A collection alone."""

    def __init__(self, collection):
        super().__init__()
        self.collection = collection

    def forward(self, kjt):
        return self.collection(kjt)


class Net(nn.Module):
    """A dense layer over the embeddings."""

    @staticmethod
    def configs():
        return tables(SUM)

    def __init__(self, configs):
        super().__init__()
        self.collection = CCEEmbeddingBagCollection(tables=configs)
        width = sum(c.embedding_dim * len(c.feature_names) for c in configs)
        self.over = nn.Linear(width, 2)

    def forward(self, kjt):
        return self.over(self.collection(kjt).values())


class BitsNet(Net):
    """Codes of 0, 1, 2, 4, 6 and 12 bits, of numbers of ids that end in the middle of a byte."""

    @staticmethod
    def configs():
        return [
            CCEEmbeddingBagConfig(
                name=f"t{rows}", num_embeddings=300 + rows % 7, embedding_dim=8, num_chunks=2,
                feature_names=[feature], num_rows=rows, num_helper_rows=9,
            )
            for rows, feature in zip((1, 2, 4, 16, 64, 4096), "fghfgh", strict=True)
        ]  # fmt: skip


def rare_tables():
    """Of rare ids, of few bits and of none; and of frequent ones, which are counted too."""
    return [
        CCEEmbeddingBagConfig(
            name=name, num_embeddings=301, embedding_dim=8, num_chunks=2, feature_names=[feature],
            num_rows=rows, num_helper_rows=20, recipe="auto", examples_per_id=examples,
        )
        for name, rows, feature, examples in [
            ("t", 4, "f", 3), ("u", 1, "g", 3), ("v", 9, "h", 900),
        ]
    ] + tables(SUM)[1:2]  # fmt: skip


class RareNet(Net):
    """Tables whose ids are counted, of rare ones and of frequent ones, and a plain one."""

    @staticmethod
    def configs():
        return rare_tables()


class SequenceNet(nn.Module):
    """A dense layer over the embedding of every id."""

    @staticmethod
    def configs():
        shape = dict(num_embeddings=300, embedding_dim=16)
        return [
            CCEEmbeddingBagConfig(name="t", feature_names=["f", "g"], num_rows=5, **shape),
            EmbeddingConfig(name="p", feature_names=["h", "f"], **shape),
            CCEEmbeddingBagConfig(name="u", feature_names=["h"], num_rows=300, **shape),
        ]

    def __init__(self, configs):
        super().__init__()
        self.collection = CCEEmbeddingCollection(tables=configs)
        self.over = nn.Linear(16, 2)

    def forward(self, kjt):
        return self.over(torch.cat([part.values() for part in self.collection(kjt).values()]))


def with_optimizer(module, optimizer):
    """`module`, whose parameters are trained by (class, settings) in the backward pass."""
    cls, settings = optimizer
    apply_optimizer_in_backward(cls, list(module.parameters()), dict(settings))
    return module


def collection(configs, optimizer=ROWWISE, **options):
    """An unsharded collection with its optimizer in the backward pass."""
    return with_optimizer(CCEEmbeddingBagCollection(configs, **options), optimizer)


class Loss(nn.Module):
    """A dense layer over the embeddings, as pipelines expect it: (loss, output)."""

    def __init__(self):
        super().__init__()
        self.collection = collection(tables(MEAN))
        self.over = nn.Linear(16 + 16 + 8 + 8 + 8, 1)

    def forward(self, data):
        out = self.over(self.collection(data.ids).values())
        return out.square().mean(), out.detach()


def shard_by(plan, model, sharders=None):
    """`model` under DistributedModelParallel, as a plan says."""
    sharders = get_default_sharders() if sharders is None else sharders
    return DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders)


def shard(model, configs, kind="auto", **options):
    """`model` under DistributedModelParallel, by the plan that `make_plan` makes of `kind`."""
    return shard_by(make_plan(model, configs, CPU, kind, **options), model)


def sharded_tables(kind="tw", **options):
    """`tables` that are summed, alone in a model; `options` of the collection."""
    return shard(Model(collection(tables(SUM), **options)), tables(SUM), kind)


def sharded_sequences():
    """The tables of `SequenceNet`, alone in a model."""
    configs = SequenceNet.configs()
    return shard(Model(with_optimizer(CCEEmbeddingCollection(configs), ROWWISE)), configs, "tw")


def step_outputs(model, data, pipeline_class=None, cluster_after=()):
    """What each training step gives, by a pipeline or by the plain loop.

    After the steps in `cluster_after` there is a clustering step.
    """
    dense = [p for name, p in model.named_parameters() if "over" in name]
    optimizer = torch.optim.SGD(dense, lr=0.1)
    pipeline = pipeline_class and pipeline_class(model, optimizer, CPU)
    source, outputs = iter(data), []
    for step, features in enumerate(data):
        if pipeline:
            outputs.append(pipeline.progress(source))
        else:
            optimizer.zero_grad()
            loss, out = model(features)
            loss.backward()
            optimizer.step()
            outputs.append(out)
        if step in cluster_after:
            cluster(model)
    return outputs
