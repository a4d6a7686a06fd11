"""The types in which ranks send each other a batch, which the messages themselves do not tell.

A rank takes what arrives for what its own batch is: int32 ids of another rank would be read as half
as many int64 ones beside memory that nobody wrote, or the message ends the process in gloo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.lookup.features import remade

NUMBERS = 4
"""That a rank tells of its first batch."""
_SHORT = torch.iinfo(torch.int32)


def numbers_of(features: KeyedJaggedTensor) -> list[int]:
    """What a rank tells of its first batch, each 1 or 0; the ranks' are added up."""
    return [
        features.values().dtype == torch.int64,
        features.lengths().dtype == torch.int64,
        features.weights_or_none() is not None,
        features.variable_stride_per_key(),
    ]


@dataclass(frozen=True)
class BatchForm:
    """Types that all ranks of a collection use."""

    ids: torch.dtype
    bags: torch.dtype

    @classmethod
    def agreed(cls, numbers: Sequence[float], ranks: int, named: str) -> BatchForm:
        """By the sums of `numbers_of` of every rank: the widest type that any of them has.

        Args:
            numbers: the sums.
            ranks: how many there are.
            named: the features, for messages.

        Raises:
            ValueError: some ranks have weights, or a batch size per feature, and others have not.
        """
        long_ids, long_bags, weighted, variable = (int(number) for number in numbers)
        for count, what in ((weighted, "weights"), (variable, "a batch size per feature")):
            if 0 < count < ranks:
                raise ValueError(
                    f"the batches of {count} of {ranks} ranks have {what} for features {named}, "
                    "and those of the others have not; give the batches of all ranks one form"
                )
        types = (torch.int32, torch.int64)
        return cls(types[long_ids > 0], types[long_bags > 0])

    def of(self, features: KeyedJaggedTensor, named: str) -> KeyedJaggedTensor:
        """`features` in these types.

        Raises:
            ValueError: an id does not fit in the type that the first batches had.
        """
        ids, bags = features.values(), features.lengths()
        if ids.dtype == self.ids and bags.dtype == self.bags:
            return features
        if self.ids == torch.int32 and ids.dtype == torch.int64 and ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < _SHORT.min or high > _SHORT.max:
                raise ValueError(
                    f"ids of features {named} were int32 in the first batch of every rank, and "
                    f"now there is {high if high > _SHORT.max else low}; give int64 ids from the "
                    "first batch on"
                )
        per_key, weights = features.length_per_key_or_none(), features.weights_or_none()
        return remade(features, ids.to(self.ids), weights, per_key, bags=self.bags)
