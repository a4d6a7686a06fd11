"""What the kernel for int32 rows hands on, and what goes TorchRec's way."""

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag

from cce_torchrec.lookup.narrow import NarrowKernel


class Recorded(nn.Module):
    """Stands for FBGEMM's module."""

    def forward(self, **given):
        return given


def kernel():
    made = NarrowKernel.__new__(NarrowKernel)
    nn.Module.__init__(made)
    made.emb_module = Recorded()
    return made


def batch(dtype=torch.int32, weights=None, **sizes):
    ids, lengths = torch.arange(4, dtype=dtype), torch.ones(4, dtype=dtype)
    return KeyedJaggedTensor(["f", "g"], ids, weights, lengths=lengths, **sizes)


def test_int32_rows_go_on_as_they_are():
    features = batch(weights=torch.rand(4))
    given = kernel()(features)
    assert given["indices"] is features.values() and given["offsets"].dtype == torch.int32
    assert given["per_sample_weights"] is features.weights()


def test_weights_that_are_not_of_samples_are_left_out():
    assert kernel()(batch(weights=torch.arange(4)))["per_sample_weights"] is None


@pytest.mark.parametrize(
    "features, places",
    [
        (batch(torch.int64), {}),
        (batch(stride_per_key_per_rank=[[1], [3]]), {}),
        # As TorchRec calls several kernels of a lookup under a batch size per feature.
        (
            batch(torch.int64, stride_per_key_per_rank=[[1], [3]]),
            {"vbe_output": torch.zeros(4), "vbe_output_offsets": torch.zeros(2)},
        ),
    ],
    ids=["int64", "sizes by feature", "one output of several kernels"],
)
def test_the_rest_goes_torchrecs_way(monkeypatch, features, places):
    called = []
    monkeypatch.setattr(
        BatchedFusedEmbeddingBag, "forward", lambda self, *args, **named: called.append(named)
    )
    kernel()(features, **places)
    assert called == [places]
