"""From pooled physical features back to the logical KeyedTensor: order, names, MEAN."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from cce_torchrec.config import is_cce
from cce_torchrec.table import Table, TableFeature, physical_feature


def divides_by_length(config: EmbeddingBagConfig, is_weighted: bool) -> bool:
    """Whether MEAN is the pooled sum over the bag length here, not FBGEMM's own MEAN."""
    # FBGEMM's MEAN would divide by the rows of a bag, and a CCE table reads two an id.
    return config.pooling == PoolingType.MEAN and (is_weighted or is_cce(config))


@functools.lru_cache(maxsize=256)
def tensor_of(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`values` as int32 on `device`."""
    # Kept, so that a batch does not wait for the copy.
    return torch.tensor(values, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class LogicalOutput:
    """Names, dimensions and sources of the logical output, feature by feature of the tables."""

    names: list[str]
    dims: list[int]
    slots: list[TableFeature]
    physical: list[list[str]]
    """Per logical feature, the physical features whose concatenation it is."""
    pooling: list[PoolingType]
    mean: list[bool]
    """Whether the pooled sum is divided by the bag length here."""
    order: list[int]
    """Which of them is first in the output, second, and so on."""

    @classmethod
    def from_configs(
        cls,
        configs: Sequence[EmbeddingBagConfig],
        is_weighted: bool,
        order: Sequence[str] | None = None,
    ) -> LogicalOutput:
        """The output of a collection of these tables, in their order or that of the names `order`.

        Raises:
            ValueError: `order` has other names.
        """
        out = cls([], [], [], [], [], [], [])
        for config, names in zip(configs, get_embedding_names_by_table(list(configs)), strict=True):
            table = Table(config)
            for feature, name in zip(config.feature_names, names, strict=True):
                out.names.append(name)
                out.dims.append(config.embedding_dim)
                out.slots.append(TableFeature(config.name, feature))
                chunks = table.chunks_of(feature)
                out.physical.append([physical_feature(config.name, feature, j) for j in chunks])
                out.pooling.append(config.pooling)
                out.mean.append(divides_by_length(config, is_weighted))
        if order is not None and sorted(order) != sorted(out.names):
            raise ValueError(
                f"output_order is {list(order)}, and the output has {out.names}; name each once"
            )
        out.order.extend(out.names.index(name) for name in (out.names if order is None else order))
        return out

    @property
    def keys(self) -> list[str]:
        """Names in the order of the output."""
        return [self.names[i] for i in self.order]

    @property
    def length_per_key(self) -> list[int]:
        """Dimensions in the order of the output."""
        return [self.dims[i] for i in self.order]

    def divided(self, row_wise: Collection[str]) -> LogicalOutput:
        """The same where tables `row_wise` are cut by rows: their MEAN is that of all ranks."""
        mean = [
            divides or (slot.table in row_wise and pooling == PoolingType.MEAN)
            for divides, slot, pooling in zip(self.mean, self.slots, self.pooling, strict=True)
        ]
        return replace(self, mean=mean)

    def column_order(
        self, names: Sequence[str], dims: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Widths of the parts of a tensor of features `names`, and their logical order.

        Neighbours that stay together are one part, so an order that already fits gives one.
        """
        position = {name: i for i, name in enumerate(names)}
        runs: list[list[int]] = []
        for i in (position[name] for own in self.order for name in self.physical[own]):
            if runs and runs[-1][-1] + 1 == i:
                runs[-1].append(i)
            else:
                runs.append([i])
        order = [sum(run[0] > other[0] for other in runs) for run in runs]
        return [sum(dims[i] for i in run) for run in sorted(runs)], order

    def divisor(self, features: KeyedJaggedTensor) -> torch.Tensor | None:
        """Bag lengths [B, sum of dims], 1 where nothing is divided; None without MEAN tables."""
        if not any(self.mean):
            return None
        position = {key: i for i, key in enumerate(features.keys())}
        # An empty bag has the sum 0, and 0 / 1 for its mean.
        bags = features.lengths().clamp(min=1).split(features.stride_per_key())
        # In the order of the output, which the divisor is as wide as.
        slots = [self.slots[i] for i in self.order]
        found = [bags[position[slot.feature]] for slot in slots]
        if features.variable_stride_per_key():
            names, inverse = features.inverse_indices()
            rows = [inverse[names.index(slot.feature)] for slot in slots]
            found = [bag[row] for bag, row in zip(found, rows, strict=True)]
        columns = [
            own if self.mean[i] else torch.ones_like(own)
            for own, i in zip(found, self.order, strict=True)
        ]
        return torch.stack(columns, dim=1).repeat_interleave(
            tensor_of(tuple(self.length_per_key), features.device()),
            dim=1,
            output_size=sum(self.dims),
        )

    def assemble(
        self,
        values: torch.Tensor,
        columns: tuple[list[int], list[int]],
        divisor: torch.Tensor | None,
    ) -> KeyedTensor:
        """The logical KeyedTensor of the values of the physical one, by its `column_order`."""
        widths, order = columns
        if len(order) > 1:
            # The gradient of a split is one copy; that of a slice is as large as the whole.
            parts = values.split(widths, dim=1)
            values = torch.cat([parts[i] for i in order], dim=1)
        if divisor is not None:
            values = values / divisor.to(values.dtype)
        return KeyedTensor(keys=self.keys, length_per_key=self.length_per_key, values=values)
