"""The checks of a sharded collection's batches, before anything of them is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.collectives import add_up, backend_of
from cce_torchrec.distributed.batch_form import (
    NUMBERS,
    BatchForm,
    BatchRefusedError,
    numbers_of,
)
from cce_torchrec.distributed.table_placement import TablePlacement
from cce_torchrec.lookup.features import with_weights
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
        self._form: BatchForm | None = None
        """In which ids are sent; None where they stay, and before the first batch."""

    def __call__(self, features: KeyedJaggedTensor, *refusals: Refusal) -> KeyedJaggedTensor:
        """`features`, if nothing and none of `refusals` refuses them.

        Raises:
            BatchRefusedError: a later batch was refused, of which other ranks have to be told.
            ValueError: it was refused, and they know or need not.
        """
        if not self._has_seen_batch:
            return self._first(features, refusals)
        if self._form is None:
            return self._check(features, refusals, self.inputs)
        try:
            return self._form.of(self._check(features, refusals, self.inputs), self.inputs.named)
        except ValueError as error:
            # Later batches cost no agreement: the ranks that wait for this one's ids are told in
            # their place. A message with a batch size per feature cannot say it.
            if isinstance(features, KeyedJaggedTensor) and features.variable_stride_per_key():
                raise
            raise BatchRefusedError(str(error), self._form) from error

    def _first(self, features: KeyedJaggedTensor, refusals: Sequence[Refusal]) -> KeyedJaggedTensor:
        """The same of the first batch; collective where ids are sent."""
        if self._group is None or not self.ranks_agree:
            checked = self._check(features, refusals, self.inputs.first)
            self._has_seen_batch = True
            return checked
        told = torch.zeros(NUMBERS + 1, dtype=torch.float32, device=self._device)

        def work() -> KeyedJaggedTensor:
            checked = self._check(features, refusals, self.inputs.first)
            told[:NUMBERS] = told.new_tensor(numbers_of(checked))
            return checked

        checked = add_up(told, work, self._group)
        ranks = dist.get_world_size(self._group)
        form = BatchForm.agreed(told[:NUMBERS], ranks, self.inputs.named)
        self._form, self._has_seen_batch = form, True
        return form.of(checked, self.inputs.named)

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
        weights = checked.weights_or_none()
        if weights is None or weights.dtype == torch.float32:
            return checked
        # As FBGEMM reads them; the type is one that other ranks' batches have.
        return with_weights(checked, weights.float())

    def check_variable_batch(self) -> None:
        """Refuses a batch size per feature where TorchRec or FBGEMM cannot take one.

        Raises:
            ValueError: naming the tables that are in the way.
        """
        self.check_partly_frozen()
        why = "data-parallel, for which TorchRec has no"
        tables, by_rows = self._placement.data_parallel, self._placement.plain_row_wise
        if not tables and by_rows and backend_of(self._device, self._group) == "gloo":
            why, tables = "cut by rows, for which gloo cannot gather a", by_rows
        if tables:
            raise ValueError(
                f"tables {sorted(tables)} are {why} variable batch size per feature; plan them "
                "table-wise or column-wise, or give every feature the same batch size"
            )

    def check_partly_frozen(self) -> None:
        """Refuses kernels of more than one kind where FBGEMM takes a single one.

        Raises:
            ValueError: naming the frozen tables.
        """
        if self._device.type == "cpu" and self._frozen:
            raise ValueError(
                f"tables {sorted(self._frozen)} are frozen and others are not, and FBGEMM's CPU "
                "kernels take sequences and a batch size per feature in one kernel only; freeze "
                "all tables of the collection or none, or give the frozen ones a collection"
            )
