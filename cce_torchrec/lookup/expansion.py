"""Expansion: a KeyedJaggedTensor of ids becomes one of codebook rows.

Logical slots (table, feature) come in; physical features (table chunk, feature) go out. The ids of
a `TableLookup`, one table with the chunks that are looked up together, are contiguous in the input,
and its rows are written straight into their place in the output, [chunks, ids, rows per id].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.lookup import device, native
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.lookup.id_ranges import IdRanges
from cce_torchrec.lookup.narrow import MOST
from cce_torchrec.lookup.table_lookup import TableLookup
from cce_torchrec.table import TableFeature

Work = tuple[str, torch.Tensor, torch.Tensor]
"""Of one table: what messages call it, its ids [V], and where their rows go."""


class Expansion:
    """Turns a KJT over logical slots into the KJT over physical features of one lookup."""

    _dtype = torch.int64

    def __init__(
        self, table_lookups: Sequence[TableLookup], slots: list[TableFeature], keys: list[str]
    ) -> None:
        self.table_lookups = table_lookups
        self._keys = keys
        self.slots = slots
        self._names = []
        for lookup in table_lookups:
            features = ", ".join(f"feature {slots[s].feature!r}" for s in lookup.slots)
            self._names.append(f"table {lookup.config.name!r}, {features}")
        # The kernels take the ids in their order.
        in_order = [s for lookup in table_lookups for s in lookup.slots]
        self._kernel_takes = len(table_lookups) > 0 and in_order == list(range(len(slots)))
        self._ranges = IdRanges(table_lookups, slots)
        self._invalid: dict[torch.device, torch.Tensor] = {}
        self.narrow = False
        """Whether rows may be int32, where kernels write them (narrow.py)."""
        # Per physical feature: the slot it comes from.
        self._sources = [s for t in table_lookups for _ in range(t.copies) for s in t.slots]
        self._length_maps: dict[
            tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]
        ] = {}
        self._described: tuple[object, device.DeviceTables] | None = None
        self._count_rows()

    def __getstate__(self) -> dict[str, Any]:
        """Without what describes the tables to kernels by address: a copy has its own."""
        return {**self.__dict__, "_described": None}

    def _count_rows(self) -> None:
        """Rows per id of each physical feature, which change where a table is finalized."""
        self._counted = [t.table.config for t in self.table_lookups]
        self._rows_per_id = [
            t.rows_per_id for t in self.table_lookups for _ in range(t.copies) for _ in t.slots
        ]
        self._length_maps.clear()

    def __call__(
        self,
        features: KeyedJaggedTensor,
        check: BoundsCheck,
        inverse_indices: tuple[list[str], torch.Tensor] | None = None,
    ) -> KeyedJaggedTensor:
        """Codebook rows of `features`, whose keys are the logical slots in order.

        Nothing of `features` is written to. With a batch size per feature, `inverse_indices` of
        logical features become those of the physical ones.
        """
        # A table that was finalized since has one row per id instead of two.
        if self._counted != [t.table.config for t in self.table_lookups]:
            self._count_rows()
        if self._ranges.any:
            features = self._ranges(features, check)
        if self._fits_device(features):
            # Only a graph needs to be kept away from the kernels, which read codes by address.
            compiling = torch.compiler.is_compiling()
            on_device = self._outside_graphs if compiling else self._on_device
            return on_device(features, check, inverse_indices)
        per_key = features.length_per_key()
        self._check_number(features, per_key)
        starts = list(itertools.accumulate(per_key, initial=0))
        out_per_key = [
            per_key[slot] * rows
            for slot, rows in zip(self._sources, self._rows_per_id, strict=True)
        ]
        ids, weights = features.values(), features.weights_or_none()
        # A graph does not look at what its ids and lengths are, so there rows are never unwritten.
        new = torch.zeros if torch.compiler.is_compiling() else torch.empty
        values = new(sum(out_per_key), dtype=self._dtype, device=ids.device)
        out_weights = None
        if weights is not None:
            out_weights = new(len(values), dtype=weights.dtype, device=weights.device)
        end, work = 0, []
        for name, lookup in zip(self._names, self.table_lookups, strict=True):
            bounds = [(starts[s], starts[s + 1]) for s in lookup.slots]
            own = lookup.hashed(_gather(ids, bounds))
            shape = (lookup.copies, -1, lookup.rows_per_id)
            start, end = end, end + len(own) * lookup.copies * lookup.rows_per_id
            work.append((name, own, values[start:end]))
            # Without ids there is nothing to view: the size of -1 would be ambiguous.
            if weights is not None and out_weights is not None and end > start:
                own = _gather(weights, bounds).view(1, -1, 1)
                out_weights[start:end].view(shape).copy_(own)
        self._write_rows(work, check)
        return KeyedJaggedTensor(
            keys=self._keys,
            values=values,
            weights=out_weights,
            lengths=self._lengths(features, len(values)),
            length_per_key=out_per_key,
            **self._batch_sizes(features, inverse_indices),
        )

    def _check_number(self, features: KeyedJaggedTensor, per_key: list[int]) -> None:
        """Refuses fewer ids than the features have, whose rows would be left unwritten."""
        if torch.compiler.is_compiling() or sum(per_key) <= len(features.values()):
            return
        raise ValueError(
            f"{'; '.join(self._names)}: {len(features.values())} ids arrived, and by their lengths "
            f"{per_key}; every rank must give lengths and ids that fit together"
        )

    def _write_rows(self, work: list[Work], check: BoundsCheck) -> None:
        """Writes the rows of every table's ids to where they go, all that can be by one call."""
        jobs, names = [], []
        for lookup, (name, ids, out) in zip(self.table_lookups, work, strict=True):
            ids = lookup.marked(name, ids, check)
            if native.takes(ids):
                jobs.append(lookup.job(ids, out))
                names.append(name)
            else:
                rows = lookup.rows(check(name, ids, lookup.config.num_embeddings))
                out.view(rows.shape).copy_(rows)
        found = native.expand(jobs) if jobs else []
        if check.tells and len(found):
            _tell(found, names, jobs, check)

    def _fits_device(self, features: KeyedJaggedTensor) -> bool:
        weights = features.weights_or_none()
        return (
            device.takes(features.values())
            and self._kernel_takes
            and len(features.lengths()) > 0
            and (weights is None or not weights.requires_grad)  # the kernel has no gradient
        )

    @torch.compiler.disable
    def _outside_graphs(self, *args: Any) -> KeyedJaggedTensor:
        return self._on_device(*args)

    def _on_device(
        self,
        features: KeyedJaggedTensor,
        check: BoundsCheck,
        inverse_indices: tuple[list[str], torch.Tensor] | None,
    ) -> KeyedJaggedTensor:
        """All tables in one launch, without waiting for the device (but in FATAL mode).

        Where `length_per_key` is not known there is room for as many rows as all values may have,
        and those of no bag are left behind the last one.
        """
        ids, weights = features.values(), features.weights_or_none()
        tables = self._device_tables(features.device())
        per_key, out_per_key = features.length_per_key_or_none(), None
        if per_key is not None:
            ids = ids[: sum(per_key)]
            sources = zip(self._sources, self._rows_per_id, strict=True)
            out_per_key = [per_key[slot] * rows for slot, rows in sources]
        num_out = sum(out_per_key) if out_per_key is not None else ids.numel() * tables.most_copies
        narrow = self.narrow and num_out <= MOST and not features.variable_stride_per_key()
        fatal = check.mode == BoundsCheckMode.FATAL
        if fatal:
            check.refuse_capture()
        first_bad = device.no_positions(len(self._names), ids.device) if fatal else None
        rows = tables.expand(
            ids,
            weights,
            tables.bags_of(features, self._sources),
            num_out,
            torch.int32 if narrow else torch.int64,
            self._counters(ids.device, check),
            first_bad,
            exact=out_per_key is not None,
        )
        if first_bad is not None:
            self._raise_for(ids, first_bad, check)
        return KeyedJaggedTensor(
            keys=self._keys,
            values=rows.values,
            weights=rows.weights,
            offsets=rows.offsets,  # lengths follow from them, and lookups do not ask
            length_per_key=out_per_key,
            **self._batch_sizes(features, inverse_indices),
        )

    def _counters(self, where: torch.device, check: BoundsCheck) -> torch.Tensor | None:
        """Where ids out of bounds are counted, int64 [tables]; None in modes that do not count."""
        if check.mode != BoundsCheckMode.WARNING:
            return None
        if where not in self._invalid:
            self._invalid[where] = torch.zeros(len(self._names), dtype=torch.int64, device=where)
            for name, count in zip(self._names, self._invalid[where], strict=True):
                check.watch(name, count)
        return self._invalid[where]

    def _raise_for(self, ids: torch.Tensor, first_bad: torch.Tensor, check: BoundsCheck) -> None:
        """Raises for the first table that has an id out of bounds; waits for the device."""
        tables = zip(self._names, self.table_lookups, first_bad.tolist(), strict=True)
        for name, lookup, first in tables:
            if first < 0:
                raise ValueError(
                    f"{'; '.join(self._names)}: the lengths of the batch do not add up to its "
                    f"{len(ids)} ids, or some are negative; give lengths and ids that fit"
                )
            if first < len(ids):
                check.found(name, None, int(ids[first]), lookup.config.num_embeddings)

    def _device_tables(self, where: torch.device) -> device.DeviceTables:
        """The tables as the kernels read them; described again only when they are others."""
        parts = [lookup.codes for lookup in self.table_lookups]
        codes = [None if part is None else part.described for part in parts]
        key = (where, self._counted, codes)
        if self._described is None or self._described[0] != key:
            tables = device.DeviceTables(
                [lookup.on_device() for lookup in self.table_lookups], where
            )
            self._described = (key, tables)
        return self._described[1]

    def _lengths(self, features: KeyedJaggedTensor, num_rows: int) -> torch.Tensor:
        """Rows per bag of every physical feature, one after the other, `num_rows` in all."""
        lengths = features.lengths()
        if num_rows > MOST:
            lengths = lengths.long()  # offsets are counted in the same type
        if features.variable_stride_per_key() and self._sources:
            bags = lengths.split(features.stride_per_key())
            rows_per_id = zip(self._sources, self._rows_per_id, strict=True)
            return torch.cat([bags[slot] * rows for slot, rows in rows_per_id])
        key = (lengths.device, lengths.dtype)
        if key not in self._length_maps:
            self._length_maps[key] = (
                torch.tensor(self._sources, device=lengths.device, dtype=torch.int64),
                torch.tensor(self._rows_per_id, device=lengths.device, dtype=lengths.dtype),
            )
        sources, rows = self._length_maps[key]
        by_slot = lengths.view(len(self.slots), features.stride())
        return by_slot.index_select(0, sources).mul_(rows[:, None]).view(-1)

    def _batch_sizes(
        self,
        features: KeyedJaggedTensor,
        inverse: tuple[list[str], torch.Tensor] | None,
    ) -> dict[str, Any]:
        """Batch size of the expanded KJT: one, or by physical feature where it varies."""
        if not features.variable_stride_per_key():
            return {"stride": features.stride()}
        per_rank = features.stride_per_key_per_rank()
        sizes: dict[str, Any] = {
            "stride_per_key_per_rank": [list(per_rank[s]) for s in self._sources]
        }
        if inverse is not None:
            order = [inverse[0].index(self.slots[s].feature) for s in self._sources]
            sizes["inverse_indices"] = (self._keys, inverse[1][order])
        return sizes


def _gather(values: torch.Tensor, bounds: list[tuple[int, int]]) -> torch.Tensor:
    """The parts of `values` inside `bounds`, one tensor; a view where they follow one another."""
    follows = all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    if follows:
        return values[bounds[0][0] : bounds[-1][1]]
    return torch.cat([values[start:end] for start, end in bounds])


@torch.compiler.disable  # it goes by what is found, which a graph cannot
def _tell(
    found: list[tuple[int, int]] | torch.Tensor,
    names: list[str],
    jobs: list[native.Job],
    check: BoundsCheck,
) -> None:
    """Hands ids out of bounds to `check`: number and position of the first, by job."""
    numbers = found.tolist() if isinstance(found, torch.Tensor) else found
    for name, job, (count, first) in zip(names, jobs, numbers, strict=True):
        if count:
            check.found(name, count, int(job.ids[first]), job.num_embeddings)
