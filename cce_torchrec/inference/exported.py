"""What serves without Python: TorchScript, programs of torch.export, and AOTInductor packages.

All take tensors: a server that is not Python has no KeyedJaggedTensor.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.checkpoint.whole_file import whole_file
from cce_torchrec.inference.gpu_lookup import check_scriptable
from cce_torchrec.inference.lookup import PackedLookup
from cce_torchrec.torchrec_internals import compile_package, sizes_are_any
from cce_torchrec.versions import installed_versions


class TensorInputs(nn.Module):
    """A model of dense features and a KeyedJaggedTensor, called with tensors alone.

    Args:
        model: called as `model(dense, features)`, such as TorchRec's DLRM.
        features: keys of the KeyedJaggedTensor, in the order in which ids will come.
    """

    def __init__(self, model: nn.Module, features: Sequence[str]) -> None:
        super().__init__()
        if isinstance(features, str):
            raise ValueError(f"features {features!r} is text; give a list of names")
        self.model = model
        self.features = list(features)

    def forward(
        self,
        dense: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the model gives.

        Args:
            dense: [B, dense features].
            values: ids [V], those of one feature after those of another.
            lengths: of bags [features * B].
            weights: of ids [V], where the model's tables are weighted.
        """
        features = KeyedJaggedTensor(self.features, values, weights, lengths=lengths)
        return self.model(dense, features)


Served = TensorInputs | PackedLookup
Tensors = tuple[torch.Tensor, ...]


def to_torchscript(served: Served, example: Tensors | None = None) -> torch.jit.ScriptModule:
    """`served` as TorchScript, for `torch.jit.load` in any process that has its operators.

    Args:
        served: the `lookup` of an inference collection, or `TensorInputs` of an `inference_model`.
        example: inputs of two rows or more, by which a model is traced: dense, values, lengths, and
            weights of ids where there are some. Only its lookups are scripted, so that it has no
            KeyedJaggedTensor, whose operators of FBGEMM C++ servers lack.

    Raises:
        ValueError: no `example` of a model, one that does not fit, a model that goes by the
            numbers of a batch (sequences, or collections of TorchRec's own, do), or a lookup for
            GPUs, which runs in Python alone.
    """
    check_scriptable(served)
    if isinstance(served, PackedLookup):
        return torch.jit.script(served)
    example = _example(served, example)
    with torch.no_grad():
        served(*example)  # so that what is wrong with it is said as it is
    # Only what refuses ids out of bounds has to decide anything by the numbers of a batch.
    scripted = {id(m): torch.jit.script(m) for m in served.modules() if isinstance(m, PackedLookup)}
    copied = copy.deepcopy(served, scripted).eval()
    try:
        with torch.no_grad():
            traced = torch.jit.trace(copied, example, check_trace=False)
            # torch's own check would call it with the same batch again.
            for rows in ([0], [0, 1, 0]):
                other = _with_rows(served, example, rows)
                torch.testing.assert_close(traced(*other), copied(*other))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"the model cannot be traced: with another batch it does not give the same ({error}); "
            "sequences and TorchRec's own collections go by the numbers of a batch. Use "
            "torch.jit.script in Python, or to_exported_program"
        ) from error
    return traced


def _with_rows(served: TensorInputs, example: Tensors, rows: list[int]) -> Tensors:
    """A batch of the rows `rows` of another."""
    dense, values, lengths, *weights = example
    at = torch.tensor(rows)
    own = lengths.view(len(served.features), -1)
    starts = range(0, lengths.numel(), own.shape[1])

    def of(tensor: torch.Tensor) -> torch.Tensor:
        bags = tensor.split(lengths.tolist())
        return torch.cat([bags[start + row] for start in starts for row in rows])

    return dense[at], of(values), own[:, at].reshape(-1), *map(of, weights)


def to_exported_program(served: Served, example: Tensors | None = None) -> ExportedProgram:
    """`served` as a program of torch.export, for batches of any size, 0 and 1 included.

    See `to_torchscript` for the arguments and errors.
    """
    check_scriptable(served)
    example = _example(served, example)
    # Lengths are a multiple of the batch, which a program must know of both.
    batch = Dim("batch")
    lengths = batch if _num_inputs(served) == 1 else _num_inputs(served) * batch
    sizes: list[Any] = [{0: Dim.DYNAMIC}, {0: lengths}]
    if isinstance(served, TensorInputs):
        sizes.insert(0, {0: batch})
    if len(example) > len(sizes):
        sizes.append({0: Dim.DYNAMIC})  # weights
    copied, shapes = copy.deepcopy(served).eval(), tuple(sizes)
    with torch.no_grad(), sizes_are_any():
        return torch.export.export(copied, example, dynamic_shapes=shapes, strict=False)


def to_package(served: Served, path: str | Path, example: Tensors | None = None) -> Path:
    """Compiles `served` by AOTInductor into the file `path` (.pt2), and returns it.

    Takes some 10 seconds and a C++ compiler. See `to_torchscript` for the arguments and errors.

    Raises:
        ValueError: also a `path` that does not end in .pt2, is there already, or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"{path}: the name of a package has to end in .pt2")
    if path.exists():  # a server may have it open
        raise ValueError(f"{path} is there already; give another name, or remove it")
    program = to_exported_program(served, example)
    with whole_file(path) as writing:
        compile_package(program, writing, installed_versions())
    return path


def _num_inputs(served: Served) -> int:
    if not isinstance(served, TensorInputs | PackedLookup):
        raise ValueError(
            f"{type(served).__name__} is not called with tensors; give the `lookup` of an "
            "inference collection, or TensorInputs of an inference_model"
        )
    return len(served.features) if isinstance(served, TensorInputs) else served.num_inputs


def _example(served: Served, example: Tensors | None) -> Tensors:
    """`example`, or for a lookup one of its own.

    Raises:
        ValueError: there is none, or it is not what a batch of two rows or more would be.
    """
    count = _num_inputs(served)
    if example is None and isinstance(served, PackedLookup):
        # Id 0 is everyone's, and two rows are the fewest that programs are made from.
        values = torch.zeros(2 * count, dtype=torch.int64)
        weights = (torch.ones(2 * count),) if served.is_weighted else ()
        return values, torch.ones_like(values), *weights
    wanted = "dense, values, lengths" if isinstance(served, TensorInputs) else "values, lengths"
    if example is None:
        raise ValueError(f"give an example of the model's inputs: {wanted}, of two rows or more")
    # One row would have a program made for one.
    rows, rest = divmod(example[2 if isinstance(served, TensorInputs) else 1].numel(), count)
    if rest or rows < 2:
        raise ValueError(
            f"an example is {wanted}, with {count} lengths for each of two rows or more; got "
            f"tensors of {[list(tensor.shape) for tensor in example]}"
        )
    return example
