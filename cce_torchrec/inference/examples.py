"""Examples with what a trained model gives for them, in a file that exports are compared with."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from cce_torchrec.checkpoint.whole_file import whole_file
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection

TOLERANCE = 0.02
"""Of the largest output, where no tolerance is given: int8 and int4 rows are rounded."""


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
    tolerance: float = 0.0
    """Largest difference from `expected` that is right."""

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
        tolerance: largest difference that an export may have. Default: 0.02 of the largest output.

    Raises:
        ValueError: another suffix, a batch without examples or with a batch size per feature,
            outputs that are not finite, or a file that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: examples are written as .npz")
    if features.variable_stride_per_key() or not features.stride():
        raise ValueError("give one example or more, with one batch size for all features")
    if isinstance(trained, CCEEmbeddingBagCollection):
        slots = trained.output.slots
        names = list(dict.fromkeys(slots[i].feature for i in trained.output.order))
        # As lookups without Python take them.
        features = features.permute([features.keys().index(name) for name in names])
    with torch.no_grad():
        out = trained(features) if dense is None else trained(dense, features)
    expected = (out.values() if isinstance(out, KeyedTensor) else out).float().cpu()
    if not bool(torch.isfinite(expected).all()):
        raise ValueError("the trained model gives NaN or infinite values for these examples")
    largest = float(expected.abs().amax())
    arrays: dict[str, Any] = {
        "features": np.array(features.keys()),
        "values": features.values().long().cpu().numpy(),
        "lengths": features.lengths().long().cpu().numpy(),
        "expected": expected.numpy(),
        "tolerance": np.float64(TOLERANCE * largest if tolerance is None else tolerance),
    }
    weights = features.weights_or_none()
    if weights is not None:
        arrays["weights"] = weights.detach().float().cpu().numpy()
    if dense is not None:
        arrays["dense"] = dense.detach().float().cpu().numpy()
    with whole_file(path) as writing:
        np.savez(writing, **arrays)
    return path


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
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} holds no examples ({error}); write them by write_examples"
        ) from error
    missing = {"values", "lengths", "expected", "tolerance"} - set(arrays)
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}; write it by write_examples")
    tolerance = float(arrays.pop("tolerance"))
    return Examples(features=names, tolerance=tolerance, **arrays)


def _read_parquet(path: Path, features: list[str]) -> Examples:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: Parquet needs pyarrow; pip install 'cce-torchrec[data]'"
        ) from error
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    missing = set(features) - set(table.column_names)
    if missing:
        raise ValueError(f"{path} lacks columns {sorted(missing)}; it has {table.column_names}")
    rows = [
        [bag if isinstance(bag, list) else [bag] for bag in table.column(name).to_pylist()]
        for name in features
    ]
    try:
        values = torch.tensor([i for own in rows for bag in own for i in bag], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: columns {features} are ids or lists of ids ({error})") from error
    lengths = torch.tensor([len(bag) for own in rows for bag in own])
    return Examples(features=features, values=values, lengths=lengths)
