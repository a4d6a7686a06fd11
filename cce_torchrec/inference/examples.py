"""Examples with what a trained model gives for them, in a file that exports are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from cce_torchrec.checkpoint.whole_file import whole_file
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.reasons import first_line

TOLERANCE = 0.02
"""Where none is given, in parts of the largest value of an output, a feature's or a model's: int8
and int4 rows are rounded."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A batch of B examples, and what they should give."""

    features: list[str]
    values: torch.Tensor
    """Ids [V], those of one feature after those of another."""
    lengths: torch.Tensor
    """Of bags [features * B]."""
    weights: torch.Tensor | None = None
    """Of ids, float32 [V]."""
    dense: torch.Tensor | None = None
    """float32 [B, dense features]."""
    expected: torch.Tensor | None = None
    """float32 [B, ...]."""
    tolerance: torch.Tensor | None = None
    """Largest difference from `expected` that is right, float64 [] or of each column."""

    @property
    def rows(self) -> int:
        """Examples."""
        return self.lengths.numel() // max(1, len(self.features))

    @property
    def keyed(self) -> KeyedJaggedTensor:
        """Ids and weights by feature."""
        return KeyedJaggedTensor(self.features, self.values, self.weights, lengths=self.lengths)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What an export without Python is called with."""
        given = (self.dense, self.values, self.lengths, self.weights)
        return tuple(tensor for tensor in given if tensor is not None)

    def part(self, first: int, last: int) -> Examples:
        """The examples from `first` to `last`."""
        # Those of one feature come after those of another, so that a row's ids are far apart.
        lengths = self.lengths.view(len(self.features), -1)
        ends = self.lengths.cumsum(0).view_as(lengths)
        starts = ends - lengths
        spans = [
            range(int(start[first]), int(end[last - 1]))
            for start, end in zip(starts, ends, strict=True)
        ]

        def of(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor[span.start : span.stop] for span in spans])

        return Examples(
            features=self.features,
            values=of(self.values),
            lengths=lengths[:, first:last].reshape(-1),
            weights=None if self.weights is None else of(self.weights),
            dense=None if self.dense is None else self.dense[first:last],
            expected=None if self.expected is None else self.expected[first:last],
            tolerance=self.tolerance,
        )


def write_examples(
    path: str | Path,
    trained: nn.Module,
    features: KeyedJaggedTensor,
    dense: torch.Tensor | None = None,
    *,
    tolerance: float | None = None,
) -> Path:
    """Writes a batch, and what `trained` gives for it, for `serve_check`; returns the file.

    Args:
        path: `.npz`; it appears when it is whole.
        trained: a `CCEEmbeddingBagCollection`, or a model that is called as `trained(dense,
            features)`; in evaluation mode.
        features: ids of B examples; of a model in the order in which `TensorInputs` names them.
        dense: float32 [B, dense features], of a model.
        tolerance: largest difference that an export may have. Default: 0.02 of the largest value of
            each feature, or of the largest distance of a model's outputs from their mean.

    Raises:
        ValueError: another suffix, a batch without examples, with a batch size per feature or
            without a feature, outputs that are not finite or no tensor, or a file that is there
            already or cannot be written.
    """
    path = Path(path)
    _check_asked(path, tolerance)
    _check_batch(trained, features, dense)
    if isinstance(trained, CCEEmbeddingBagCollection):
        features = _as_inputs(trained, features)
    expected, scale = _outputs(trained, features, dense)
    if tolerance is not None:
        scale = torch.tensor(tolerance / TOLERANCE, dtype=torch.float64)
    arrays: dict[str, Any] = {
        "features": np.array(features.keys()),
        "values": features.values().long().cpu().numpy(),
        "lengths": features.lengths().long().cpu().numpy(),
        "expected": expected.numpy(),
        "tolerance": (TOLERANCE * scale).numpy(),
    }
    weights = features.weights_or_none()
    if weights is not None:
        arrays["weights"] = weights.detach().float().cpu().numpy()
    if dense is not None:
        arrays["dense"] = dense.detach().float().cpu().numpy()
    with whole_file(path) as writing:
        np.savez(writing, **arrays)
    return path


def _check_asked(path: Path, tolerance: float | None) -> None:
    if path.suffix != ".npz":
        raise ValueError(f"{path}: examples are written as .npz")
    if path.exists():
        raise ValueError(f"{path} is there already; give another name, or remove it")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance {tolerance} is no number of 0 or more")


def _check_batch(
    trained: nn.Module, features: KeyedJaggedTensor, dense: torch.Tensor | None
) -> None:
    # It would be compared with itself.
    if any(hasattr(module, "packed") for module in trained.modules()):
        raise ValueError("the model is packed; examples are of the one that was trained")
    if features.variable_stride_per_key() or not features.stride():
        raise ValueError("give one example or more, with one batch size for all features")
    if dense is not None and len(dense) != features.stride():
        raise ValueError(f"{len(dense)} rows of dense features for {features.stride()} examples")


def _as_inputs(
    trained: CCEEmbeddingBagCollection, features: KeyedJaggedTensor
) -> KeyedJaggedTensor:
    """`features` as the lookup without Python takes them: in its order, and no more than it reads.

    Raises:
        ValueError: one is missing.
    """
    slots, keys = trained.output.slots, features.keys()
    names = list(dict.fromkeys(slots[i].feature for i in trained.output.order))
    missing = [name for name in names if name not in keys]
    if missing:
        raise ValueError(f"the features {keys} lack {missing}, which tables read")
    own = features.permute([keys.index(name) for name in names])
    if trained.is_weighted() or own.weights_or_none() is None:
        return own
    return KeyedJaggedTensor(names, own.values(), lengths=own.lengths())  # nothing reads weights


def _outputs(
    trained: nn.Module, features: KeyedJaggedTensor, dense: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `trained` gives in evaluation, float32 [B, ...], and the size of it, float64."""
    was_training = trained.training
    trained.eval()
    try:
        with torch.no_grad():
            out = trained(features) if dense is None else trained(dense, features)
    finally:
        trained.train(was_training)
    if not isinstance(out, KeyedTensor | torch.Tensor):
        raise ValueError(
            f"the trained module gives a {type(out).__name__}, and examples are of pooled "
            "embeddings or of a tensor; of sequences export their `lookups`"
        )
    expected = (out.values() if isinstance(out, KeyedTensor) else out).detach().float().cpu()
    if len(expected) != features.stride():
        raise ValueError(f"the trained module gives {len(expected)} rows for {features.stride()}")
    if not bool(torch.isfinite(expected).all()):
        raise ValueError("the trained model gives NaN or infinite values for these examples")
    wide = expected.double()
    if isinstance(out, KeyedTensor):
        # Tables differ in size, and a wrong small one must not hide behind a large one.
        parts = wide.abs().amax(0).split(out.length_per_key())
        return expected, torch.cat([part.amax().expand(len(part)) for part in parts])
    # What a model gives is a level and what differs by example, in which an export may be wrong.
    mean = wide.mean(0) if len(wide) > 1 else 0.0
    return expected, (wide - mean).abs().amax()


def read_examples(path: str | Path, features: list[str] | None = None) -> Examples:
    """The examples of a file.

    Args:
        path: `.npz` of `write_examples`, or `.parquet` with a column for each feature, of an id or
            a list of ids a row, which needs pyarrow.
        features: which columns of a Parquet file are read.

    Raises:
        ValueError: no such file, one that is damaged or lacks something, or another suffix.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".parquet":
        if features is None:
            raise ValueError(
                f"{path}: an export without a manifest does not name its features; give an .npz of "
                "write_examples, which does"
            )
        return _read_parquet(path, features)
    raise ValueError(f"{path}: examples are read from .npz and .parquet")


def _read_npz(path: Path) -> Examples:
    try:
        with np.load(path) as found:
            arrays = {name: torch.from_numpy(found[name]) for name in found if name != "features"}
            names = [str(name) for name in found["features"]]
    except Exception as error:  # numpy raises many kinds of it for what is damaged
        raise ValueError(
            f"{path} holds no examples ({first_line(error)}); write them by write_examples"
        ) from error
    missing = {"values", "lengths", "expected", "tolerance"} - set(arrays)
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}; write it by write_examples")
    known = {field.name for field in fields(Examples)} - {"features"}
    found = {name: array for name, array in arrays.items() if name in known}
    return _checked(path, Examples(features=names, **found))


def _checked(path: Path, examples: Examples) -> Examples:
    """`examples`, if their parts fit together.

    Raises:
        ValueError: they do not, or there are none.
    """
    own, rows = examples, examples.rows
    ids = [own.values] if own.weights is None else [own.values, own.weights]
    of_rows = [tensor for tensor in (own.dense, own.expected) if tensor is not None]
    fits = [
        own.lengths.shape == (rows * len(own.features),),
        not (own.values.is_floating_point() or own.lengths.is_floating_point()),
        bool((own.lengths >= 0).all()),
        all(tensor.shape == (int(own.lengths.sum()),) for tensor in ids),
        all(len(tensor) == rows for tensor in of_rows),
    ]
    if not rows or not all(fits):
        raise ValueError(
            f"{path} holds no examples, or their features {own.features}, values, lengths and "
            "outputs do not fit together; write it again"
        )
    return examples


def _read_parquet(path: Path, features: list[str]) -> Examples:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: Parquet needs pyarrow; pip install 'cce-torchrec[data]'"
        ) from error
    try:
        table = parquet.read_table(path)
    except Exception as error:  # pyarrow has errors of its own for what is damaged
        raise ValueError(f"{path} cannot be read ({first_line(error)})") from error
    missing = set(features) - set(table.column_names)
    if missing:
        raise ValueError(f"{path} lacks columns {sorted(missing)}; it has {table.column_names}")
    rows = [_bags(path, name, table.column(name)) for name in features]
    try:
        values = torch.tensor([i for own in rows for bag in own for i in bag], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: ids of {features} are missing, or no int64 ({first_line(error)})"
        ) from error
    lengths = torch.tensor([len(bag) for own in rows for bag in own])
    return _checked(path, Examples(features=features, values=values, lengths=lengths))


def _bags(path: Path, name: str, column: Any) -> list[list[int]]:
    """The ids of each row of a column of Arrow's."""
    kind = column.type.value_type if hasattr(column.type, "value_type") else column.type
    if not str(kind).startswith(("int", "uint")):  # floats would be cut off
        raise ValueError(f"{path}: column {name!r} is {kind}, and features are ids or lists of ids")
    return [bag if isinstance(bag, list) else [bag] for bag in column.to_pylist()]
