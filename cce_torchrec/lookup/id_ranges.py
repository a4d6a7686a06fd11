"""Features with ids of their own in one table: their ids become the table's, before expansion.

A pass over the ids of all features of a lookup, before the expansion's over the rows of all chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.codes.hashing import hash_ids, raw_id_key
from cce_torchrec.config import is_cce
from cce_torchrec.lookup import native
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.lookup.device import starts_of
from cce_torchrec.lookup.features import with_ids
from cce_torchrec.lookup.table_lookup import TableLookup
from cce_torchrec.table import TableFeature

_END = "give the feature a longer range in id_ranges"
_NO_END = torch.iinfo(torch.int64).max


@dataclass(frozen=True, kw_only=True)
class IdRange:
    """The ids of one feature, as its table counts them."""

    name: str
    """For messages."""
    ids: range
    key: int | None
    """What raw ids are hashed with; None where ids are not hashed."""

    def apply(self, ids: torch.Tensor, checked: bool) -> torch.Tensor:
        """The table's ids of the feature's `ids`; with `checked`, those out of bounds as its 0."""
        if self.key is not None:
            return hash_ids(ids, self.key, len(self.ids)) + self.ids.start
        if checked:
            ids = ids.masked_fill((ids < 0) | (ids >= len(self.ids)), 0)
        return ids + self.ids.start


def id_range(lookup: TableLookup, feature: str) -> IdRange | None:
    """The range of `feature` in the table of `lookup`; None where it reads the table's own ids."""
    config = lookup.config
    if not is_cce(config) or not config.id_ranges:
        return None
    ids = config.id_ranges[feature]
    # Features that share a range share its ids.
    key = raw_id_key(config.seed, f"{config.name}#{ids.start}") if config.hash_ids else None
    return IdRange(name=f"table {config.name!r}, feature {feature!r}", ids=ids, key=key)


class IdRanges:
    """The ranges of all slots of one lookup."""

    def __init__(self, lookups: Sequence[TableLookup], slots: Sequence[TableFeature]) -> None:
        self._ranges: list[IdRange | None] = [None] * len(slots)
        for lookup in lookups:
            for slot in lookup.slots:
                self._ranges[slot] = id_range(lookup, slots[slot].feature)
        every = [one for one in self._ranges if one is not None]
        self.any = bool(every)
        """Whether there is something to do."""
        self._name = "; ".join(one.name for one in every)
        hashed = any(one.key is not None for one in every)
        self._rows = [_numbers(one)[: 5 if hashed else 3] for one in self._ranges]
        self._on: dict[torch.device, torch.Tensor] = {}

    def __call__(self, features: KeyedJaggedTensor, check: BoundsCheck) -> KeyedJaggedTensor:
        """`features`, whose keys are the slots, with their tables' ids.

        Ids out of bounds are what `check` makes of them, and the first of their range.

        Raises:
            ValueError: in FATAL mode, naming table, feature and the first bad value.
        """
        ids, per_key = features.values(), features.length_per_key_or_none()
        if per_key is None and ids.device.type == "cpu":
            per_key = features.length_per_key()
        # Both of a batch without bags, of which TorchRec makes no offsets.
        if not len(features.lengths()):
            return features  # no bag, and so no id of one
        # A graph has no number of a batch to compare, and no address to hand on.
        if per_key is not None and not torch.compiler.is_compiling():
            if sum(per_key) > len(ids):
                return features  # the expansion refuses it, which knows what to say
            if native.takes(ids) and not native.is_traced(ids):
                return with_ids(features, self._compiled(ids, per_key, check))
        slot = self._slots(features, per_key)
        return with_ids(features, self._in_torch(ids[: len(slot)], slot, check))

    def _compiled(
        self, ids: torch.Tensor, per_key: Sequence[int], check: BoundsCheck
    ) -> torch.Tensor:
        out = ids.new_empty(sum(per_key), dtype=torch.int64)
        rows = [_numbers(one) for one in self._ranges]
        # Without a check FBGEMM would read what is there, and so do ids of the next range.
        if check.mode == BoundsCheckMode.NONE:
            rows = [[*row[:2], 0, *row[3:]] for row in rows]
        features = [[count, *row] for count, row in zip(per_key, rows, strict=True)]
        found = native.into_ranges(ids[: len(out)], features, out)
        # `found` is empty where all ids are in bounds, which is nearly always.
        start = 0
        for one, count, (bad, first) in zip(self._ranges, per_key, found, strict=False):
            if bad and one is not None:
                check.found(one.name, bad, int(ids[start + first]), len(one.ids), _END)
            start += count
        return out

    def _in_torch(self, ids: torch.Tensor, slot: torch.Tensor, check: BoundsCheck) -> torch.Tensor:
        """The same for `ids` of the slots `slot`, in a graph or on a GPU that is not waited for."""
        if ids.device not in self._on:
            self._on[ids.device] = torch.tensor(self._rows, dtype=torch.int64, device=ids.device)
        # Of each id: one launch, and one read of memory, for all of its numbers.
        numbers = self._on[ids.device].index_select(0, slot)
        first, sizes, checked, *hashed = numbers.unbind(1)
        own = ids.long()
        if hashed:
            raw, keys = hashed
            own = torch.where(raw.bool(), hash_ids(own, keys, sizes), own)
        if check.mode != BoundsCheckMode.NONE:
            bad = ((own < 0) | (own >= sizes)) & checked.bool()
            if check.tells and not bad.is_meta:
                self._tell(own, slot, bad, check)
            own = own.masked_fill(bad, 0)
        return own + first

    def _slots(self, features: KeyedJaggedTensor, per_key: list[int] | None) -> torch.Tensor:
        """The slot of each id, int64; without waiting for a GPU."""
        device, count = features.device(), len(self._ranges)
        if per_key is not None and device.type == "cpu":
            lengths = torch.tensor(per_key)
            return torch.arange(count).repeat_interleave(lengths, output_size=sum(per_key))
        # By offsets, which are where the ids are: lengths would have to be read back to split by.
        offsets, stride = features.offsets(), features.stride()
        if features.variable_stride_per_key():
            ends = offsets[starts_of(features.stride_per_key(), device)[1:]]
        else:
            ends = offsets[stride::stride]
        places = torch.arange(features.values().numel(), device=device)
        # Those beyond the last bag are of no feature, and are not looked up.
        return torch.searchsorted(ends.long(), places, right=True).clamp(max=count - 1)

    @torch.compiler.disable  # it goes by what is found, which a graph cannot
    def _tell(
        self, ids: torch.Tensor, slot: torch.Tensor, bad: torch.Tensor, check: BoundsCheck
    ) -> None:
        """Hands ids out of bounds to `check`."""
        if check.counted_on_device(self._name, bad) or not bad.any():
            return
        for number in slot[bad].unique().tolist():
            one, own = self._ranges[number], ids[bad & (slot == number)]
            assert one is not None  # others are not checked
            check.found(one.name, len(own), int(own[0]), len(one.ids), _END)


def _numbers(one: IdRange | None) -> list[int]:
    """First id, number of ids, whether they are checked, whether they are hashed, and with what.

    Ids of a slot without a range are left as they are.
    """
    if one is None:
        return [0, _NO_END, 0, 0, 0]
    raw = one.key is not None
    return [one.ids.start, len(one.ids), int(not raw), int(raw), one.key or 0]
