"""The types in which ranks send each other a batch, and what they send if they have refused it.

Messages do not tell their types, and a rank takes what arrives for what its own batch is: int32 ids
of another rank would be read as half as many int64 ones beside memory that nobody wrote, or gloo
ends the process.
"""

from __future__ import annotations

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
    """Types that all ranks of a collection use, and whether ids have weights."""

    ids: torch.dtype
    bags: torch.dtype
    weighted: bool
    ranks: int
    device: torch.device

    @classmethod
    def agreed(cls, numbers: torch.Tensor, ranks: int, named: str) -> BatchForm:
        """By the sums of `numbers_of` of every rank: the widest type that any of them has.

        Args:
            numbers: the sums, where batches are.
            ranks: how many there are.
            named: the features, for messages.

        Raises:
            ValueError: some ranks have weights, or a batch size per feature, and others have not.
        """
        long_ids, long_bags, weighted, variable = (int(n) for n in numbers.tolist())
        for count, what in ((weighted, "weights"), (variable, "a batch size per feature")):
            if 0 < count < ranks:
                raise ValueError(
                    f"the batches of {count} of {ranks} ranks have {what} for features {named}, "
                    "and those of the others have not; give the batches of all ranks one form"
                )
        types = (torch.int32, torch.int64)
        return cls(types[long_ids > 0], types[long_bags > 0], weighted > 0, ranks, numbers.device)

    def of(self, features: KeyedJaggedTensor, named: str) -> KeyedJaggedTensor:
        """`features` in these types.

        Raises:
            ValueError: an id does not fit in the type that the first batches had.
        """
        ids, bags = features.values(), features.lengths()
        if ids.dtype == self.ids and bags.dtype == self.bags:
            return features
        # This cast alone can lose something: all others widen.
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

    def refusal(self, keys: list[str], ids: int) -> KeyedJaggedTensor:
        """What a rank that has refused its batch sends for the features `keys`: no bag.

        And yet `ids` for each rank, which no batch has, see `check_arrived`. TorchRec goes by
        lengths on the way, where values beyond them do no harm, and negative lengths would.
        """
        values = torch.zeros(ids * self.ranks, dtype=self.ids, device=self.device)
        return _Refusal(
            keys,
            values,
            weights=values.float() if self.weighted else None,
            lengths=values.new_zeros(0, dtype=self.bags),
            stride=0,
            length_per_key=[0] * len(keys),
        )


class _Refusal(KeyedJaggedTensor):
    """Values without bags, as many for each rank, also for those that have none of the features."""

    def dist_splits(self, key_splits: list[int]) -> list[list[int]]:
        """How much of each of `dist_tensors` goes to each rank."""
        bags, *rest = super().dist_splits(key_splits)
        each = self.values().numel() // len(key_splits)
        return [bags, *([each] * len(key_splits) for _ in rest)]


class BatchRefusedError(ValueError):
    """A batch of this rank was refused, and the other ranks wait for its ids in `form`."""

    def __init__(self, reason: str, form: BatchForm) -> None:
        super().__init__(reason)
        self.form = form


def check_arrived(features: KeyedJaggedTensor) -> None:
    """Refuses what arrived from other ranks, where one of them has refused its batch.

    Raises:
        ValueError: naming the features.
    """
    ids = sum(features.length_per_key())
    if ids != features.values().numel():
        raise ValueError(
            f"features {features.keys()} of this rank: another rank has refused its batch, and no "
            "rank looks this one up; the error of that rank says why"
        )
