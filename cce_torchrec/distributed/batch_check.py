"""The batches of a sharded collection: checked, the first one by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.collectives import together
from cce_torchrec.lookup.inputs import InputCheck

Refusal = Callable[[KeyedJaggedTensor], None]
"""Raises ValueError where a batch is not to be looked up."""


class BatchCheck:
    """Checks each batch of a rank before it is distributed.

    Args:
        check: what every collection checks.
        refusals: what TorchRec's shardings cannot do besides.
        device: of the tables.
        group: ranks that send each other ids; None where none are sent.
    """

    def __init__(
        self,
        check: InputCheck,
        refusals: Sequence[Refusal],
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._check, self._refusals = check, list(refusals)
        self._device, self._group = device, group
        self._has_seen_batch = False

    def __call__(self, features: KeyedJaggedTensor, *refusals: Refusal) -> KeyedJaggedTensor:
        """`features` as lookups take them.

        As in TorchRec the first batch is validated more closely; ranks agree about it.

        Raises:
            ValueError: what `InputCheck` or one of the refusals raises; of a first batch on every
                rank, if on any.
        """
        # Later batches cost no agreement: what one rank refuses the others wait for, as they do for
        # any other error there.
        if self._has_seen_batch:
            return self._checked(self._check, features, refusals)
        checked = together(
            self._checked,
            self._check.first,
            features,
            refusals,
            device=self._device,
            group=self._group,
        )
        self._has_seen_batch = True
        return checked

    def _checked(
        self,
        check: Callable[[KeyedJaggedTensor], KeyedJaggedTensor],
        features: KeyedJaggedTensor,
        refusals: Sequence[Refusal],
    ) -> KeyedJaggedTensor:
        for refuse in refusals:
            refuse(features)
        checked = check(features)
        for refuse in self._refusals:
            refuse(checked)
        return checked


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Does what is inside without gradients where the caller is in `torch.inference_mode`.

    FBGEMM's lookup has a kernel for that mode on GPUs only; results are the same.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
