"""The checks of a sharded collection's batches, before anything of them is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.collectives import backend_of, together
from cce_torchrec.distributed.table_placement import TablePlacement
from cce_torchrec.lookup.inputs import InputCheck
from cce_torchrec.spans import span

Refusal = Callable[[KeyedJaggedTensor], None]
"""Raises ValueError for what a caller cannot take."""


class BatchCheck:
    """Gives features as lookups take them, or raises ValueError.

    As in TorchRec the first batch is validated more closely; ranks that send each other ids agree
    about it.

    Args:
        inputs: the checks of any collection.
        placement: of the tables.
        partly_frozen: tables that are not trained, where others are.
        device: of the tables.
        group: the ranks that share them.
    """

    def __init__(
        self,
        inputs: InputCheck,
        placement: TablePlacement,
        *,
        partly_frozen: set[str],
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.inputs, self._placement, self._frozen = inputs, placement, partly_frozen
        self._device, self._group = device, group
        self.ranks_agree = True
        """Whether ids are sent to other ranks, which then have to hear of a failure."""
        self._has_seen_batch = False

    def __call__(self, features: KeyedJaggedTensor, *refusals: Refusal) -> KeyedJaggedTensor:
        """`features`, if nothing and none of `refusals` refuses them."""
        if self._has_seen_batch:
            return self._check(features, refusals, self.inputs)
        # Later batches cost no agreement: what one rank refuses the others wait for, as they do for
        # any other error there.
        checked = together(
            self._check,
            features,
            refusals,
            self.inputs.first,
            device=self._device,
            group=self._group if self.ranks_agree else None,
        )
        self._has_seen_batch = True
        return checked

    def _check(
        self,
        features: KeyedJaggedTensor,
        refusals: Sequence[Refusal],
        check: Callable[[KeyedJaggedTensor], KeyedJaggedTensor],
    ) -> KeyedJaggedTensor:
        with span("input_check"):
            for refuse in refusals:
                refuse(features)
            checked = check(features)
        if checked.variable_stride_per_key():
            self.check_variable_batch()
        return checked

    def check_variable_batch(self) -> None:
        """Refuses a batch size per feature where TorchRec or FBGEMM cannot take one.

        Raises:
            ValueError: naming the tables that are in the way.
        """
        if self._device.type == "cpu" and self._frozen:
            raise ValueError(
                f"tables {sorted(self._frozen)} are frozen and others are not, and FBGEMM's CPU "
                "kernels take sequences and a batch size per feature in one kernel only; freeze "
                "all tables of the collection or none, or give the frozen ones a collection"
            )
        why = "data-parallel, for which TorchRec has no"
        tables, by_rows = self._placement.data_parallel, self._placement.plain_row_wise
        if not tables and by_rows and backend_of(self._device, self._group) == "gloo":
            why, tables = "cut by rows, for which gloo cannot gather a", by_rows
        if tables:
            raise ValueError(
                f"tables {sorted(tables)} are {why} variable batch size per feature; plan them "
                "table-wise or column-wise, or give every feature the same batch size"
            )
