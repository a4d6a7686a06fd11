"""The table of optimizers against what torch, TorchRec and FBGEMM really keep."""

import pytest
import torch
import torchrec
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from cce_torchrec.optimizer_state import KINDS, Extent, kind_of, reset_of, state_of

ROWS, WIDTH = 10, 8
SHAPES = {Extent.TABLE: (), Extent.ROW: (ROWS,), Extent.WEIGHT: (ROWS, WIDTH)}
CLASSES = {
    "RowWiseAdagrad": (torchrec.optim.RowWiseAdagrad, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"amsgrad": True}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_torch_keeps_what_the_table_says(name):
    cls, options = CLASSES[name]
    parameter = torch.nn.Parameter(torch.randn(ROWS, WIDTH))
    optimizer = cls([parameter], lr=0.1, **options)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert kind_of(cls.__name__).name == name
    kept, kind = state_of(parameter, optimizer), kind_of(name)
    assert {key: kind.as_saved(key, value).shape for key, value in kept.items()} == {
        tensor.name: SHAPES[tensor.extent] for tensor in kind.tensors
    }
    for key, value in kept.items():
        again = kind.as_kept(key, kind.as_saved(key, value))
        assert again.shape == value.shape and again.data_ptr() == value.data_ptr()


def fused(optimizer):
    """FBGEMM's kernel for GPUs, without memory behind it: a CPU's has no Adam."""
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, WIDTH, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        optimizer=optimizer,
        device=torch.device("meta"),
    )


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("RowWiseAdagrad", EmbOptimType.EXACT_ROWWISE_ADAGRAD),
        ("Adagrad", EmbOptimType.EXACT_ADAGRAD),
        ("SGD", EmbOptimType.EXACT_SGD),
        ("Adam", EmbOptimType.ADAM),
        ("PartialRowWiseAdam", EmbOptimType.PARTIAL_ROWWISE_ADAM),
    ],
)
def test_fbgemm_keeps_what_the_table_says(name, optimizer):
    kernel, kind = fused(optimizer), kind_of(name)
    if name != "PartialRowWiseAdam":  # checkpoints have it under FBGEMM's names
        assert kind_of(str(kernel.optimizer)) is kind
    (kept,) = kernel.get_optimizer_state() or [{}]
    assert {key: tuple(value.shape) for key, value in kept.items()} == {
        tensor.name: SHAPES[tensor.extent]
        for tensor in kind.tensors
        if tensor.fused and tensor.extent is not Extent.TABLE
    }
    stored = sum(value.nbytes for value in kept.values())
    assert kind.fused_bytes(rows=ROWS, width=WIDTH, chunk_dim=WIDTH) == stored


def test_chunks_in_one_shard_have_row_wise_state_each():
    rowwise = kind_of("RowWiseAdagrad")
    assert rowwise.fused_bytes(rows=ROWS, width=4 * WIDTH, chunk_dim=WIDTH) == 4 * 4 * ROWS
    assert rowwise.fused_bytes(rows=ROWS, width=0, chunk_dim=0) == 0


def test_unknown_optimizers_keep_their_names_and_count_nothing():
    kind = kind_of("lamb")
    assert (kind.name, kind.tensors) == ("lamb", ())
    assert kind.torch_name("momentum1") == "momentum1"
    assert kind.fused_bytes(rows=ROWS, width=WIDTH, chunk_dim=WIDTH) == 0
    assert reset_of("square_avg") == reset_of("sum")


def test_a_name_of_a_tensor_has_one_reset():
    resets = {}
    for kind in KINDS:
        for tensor in kind.tensors:
            assert resets.setdefault(tensor.name, tensor.reset) == tensor.reset
