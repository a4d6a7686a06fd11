"""A data set in memory: dense features, one id per categorical feature, a label per row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:  # pandas comes with the extra `demo`; the synthetic data set needs none
    import pandas as pd


@dataclass(frozen=True)
class Rows:
    """Shapes: `dense` float32 [n, d], `ids` int64 [n, features], `labels` float32 [n]."""

    dense: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    def take(self, index: torch.Tensor) -> Rows:
        """The rows `index`."""
        return Rows(self.dense[index], self.ids[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A data set and its split."""

    name: str
    features: dict[str, int]
    """Categorical features in order, with their numbers of ids."""
    compressed: list[str]
    """Features whose tables a compression method replaces."""
    train: Rows
    validation: Rows


def require_columns(frame: pd.DataFrame, columns: list[str], where: Path) -> None:
    """Raises ValueError, naming what is missing, unless `frame` of `where` has `columns`."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(f"{where} lacks columns {missing}; it has {list(frame.columns)}")


def distinct_ids(frame: pd.DataFrame, columns: list[str]) -> tuple[np.ndarray, int]:
    """Ids without gaps of the distinct combinations of `columns`, and their number."""
    # Without dropna=False a row where a column is empty would get no id.
    codes = frame.groupby(columns, observed=True, sort=True, dropna=False).ngroup().to_numpy()
    return codes.astype(np.int64), int(codes.max()) + 1


def random_split(num_rows: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers of training, and of the random `share` of `num_rows` that validates."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    num_validation = int(num_rows * share)
    return order[num_validation:], order[:num_validation]
