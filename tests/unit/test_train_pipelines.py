"""Which pipeline the training program takes, and what it does for a GPU, with stand-ins."""

import re
from types import SimpleNamespace

import pytest
import torch
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineSparseDist,
)

from cce_torchrec import data
from cce_torchrec.train import job, options, pipelines
from cce_torchrec.train.job import Batch
from cce_torchrec.train.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "given, device, ranks, expected",
    [
        ([], CPU, 1, "none"),
        ([], CPU, 2, "sparse-dist"),
        ([], GPU, 1, "sparse-dist"),
        ([], GPU, 8, "sparse-dist"),
        (["--no-pipeline"], GPU, 8, "none"),
        (["--pipeline", "none"], CPU, 2, "none"),
        (["--pipeline", "sparse-dist"], CPU, 1, "sparse-dist"),
        (["--pipeline", "prefetch"], GPU, 1, "prefetch"),
    ],
)
def test_what_is_chosen(given, device, ranks, expected):
    args = options.parse(given)
    assert pipelines.chosen(args.pipeline, device, ranks) == expected
    assert "pipeline" not in options.lasting(args)


def test_prefetch_on_a_cpu_is_refused_before_any_data_is_read(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"prefetch fills caches on a CUDA device, .* on cpu; use"):
        Trainer(options.parse(["--pipeline", "prefetch"]), CPU)


@pytest.mark.parametrize(
    "name, params", [("prefetch", {"prefetch_pipeline": True}), ("none", None)]
)
def test_sharders_are_told_of_prefetching(name, params, monkeypatch):
    class Stop(Exception):
        pass

    def sharders(fused_params):
        raise Stop(fused_params)

    monkeypatch.setattr(job, "make_plan", lambda *_, **__: None)
    monkeypatch.setattr(job, "get_default_sharders", sharders)
    args = options.parse(["--lr", "0.1"])
    configs = [
        job.EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=16, feature_names=["t"])
    ]
    with pytest.raises(Stop) as told:
        job.build(args, configs, 4, CPU, 0, pipelines.fused_params(name))
    assert told.value.args == (params,)


def test_kinds():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    made = {
        name: pipelines.make(name, model, optimizer, CPU) for name in ("sparse-dist", "prefetch")
    }
    assert type(made["sparse-dist"]) is TrainPipelineSparseDist
    assert type(made["prefetch"]) is PrefetchTrainPipelineSparseDist


def trainer(device):
    """A part of one: what makes batches, and the plain loop over a model that reads them."""
    out = Trainer.__new__(Trainer)
    out.args = options.parse(["--batch-size", "4"])
    out.device, out.rank, out.world_size = device, 0, 1
    out.pipeline, out.steps, out.features = "none", 2, ["a", "b"]
    rows = data.Rows(torch.randn(9, 3), torch.arange(18).view(9, 2), torch.ones(9))
    out.dataset = data.Dataset("d", {"a": 18, "b": 18}, ["a"], rows, rows)
    weight = torch.nn.Parameter(torch.ones(3))
    out.optimizer = torch.optim.SGD([weight])

    def model(batch):
        loss = (batch.dense @ weight).sum()
        return loss, (loss.detach(), batch.labels)

    out.model = model
    return out


@pytest.mark.parametrize("device", [CPU, GPU])
def test_batches_for_a_gpu_are_pinned_and_copied_without_waiting(device, monkeypatch):
    pinned, copied = [], []

    def pin(self):
        twin = Batch(self.dense, self.ids, self.labels)
        pinned.append(twin)
        return twin

    def to(self, where, non_blocking=False):
        copied.append((self, where, non_blocking))
        return self

    monkeypatch.setattr(Batch, "pin_memory", pin)
    monkeypatch.setattr(Batch, "to", to)
    assert len(list(trainer(device)._losses(1, 0))) == 2
    assert [(where, non_blocking) for _, where, non_blocking in copied] == [(device, True)] * 2
    assert len(pinned) == (2 if device == GPU else 0)
    if device == GPU:
        assert all(batch is twin for (batch, _, _), twin in zip(copied, pinned, strict=True))


@pytest.mark.parametrize("rows", [[100, 90], [0, 5, 5], [7, 8]])
def test_ranks_that_have_read_unequal_data_are_refused(rows, monkeypatch):
    monkeypatch.setattr("cce_torchrec.train.shared_data.agree", lambda work, _: (work()[0], rows))
    monkeypatch.setattr(data, "load", lambda *_: SimpleNamespace(num_train=rows[0]))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: len(rows))
    with pytest.raises(ValueError, match=re.escape(f"have read {rows} rows to train on")):
        Trainer(options.parse(["--dataset", "ml-1m", "--data", "folder"]), CPU)


class Scaled(torch.nn.Module):
    """A model of one weight."""

    def __init__(self, weight):
        super().__init__()
        self.weights = [weight]

    def forward(self, dense, ids):
        return dense[:, 0] * self.weights[0]


@pytest.mark.parametrize("examples", [0, 1, 3])
def test_the_loss_of_a_share_without_examples_is_zero(examples):
    """So that its gradient leaves the other ranks' as it is; the mean of nothing would be NaN."""
    weight = torch.ones(1, requires_grad=True)
    model = job.WithLoss(Scaled(weight))
    dense, labels = torch.arange(float(examples)).view(-1, 1), torch.ones(examples)
    loss, _ = model(Batch(dense, SimpleNamespace(), labels))
    loss.backward()
    logits = dense[:, 0]
    expected = sum(float(torch.log1p(torch.exp(-x))) for x in logits) / max(1, examples)
    assert float(loss.detach()) == pytest.approx(expected) and weight.grad.isfinite().all()
