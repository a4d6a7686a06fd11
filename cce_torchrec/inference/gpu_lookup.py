"""The lookup of packed tables on a GPU."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from cce_torchrec.gpu.usable import unusable
from cce_torchrec.inference.lookup import PackedLookup, check_weights, numbers_of
from cce_torchrec.inference.packed_tables import PackedTables

_WHOLE = (torch.int32, torch.int64)
_PYTHON_ONLY = (
    "lookup 'triton' runs in Python alone; make the collection with lookup='fused' or "
    "lookup='portable' for TorchScript, torch.export and AOTInductor"
)


class TritonLookup(PackedLookup):
    """See `PackedLookup`: for tensors on CUDA, or on a CPU where Triton interprets kernels.

    One kernel looks up all tables, after a sum over the lengths. Without `ignores` the host then
    waits for the kernel, once a call, to know whether the batch was sound. With `ignores` it waits
    for nothing, and nothing is refused that only the device knows: ids out of bounds are read as
    id 0, and of lengths that do not fit each bag has the values that there are.
    """

    numbers: torch.Tensor
    """int64 [features, ...]: see `numbers_of`."""

    def __init__(self, packed: PackedTables, ignores: bool = False) -> None:
        super().__init__(packed, ignores)
        from cce_torchrec.inference.triton_lookup import Shape  # here: Triton may not be installed

        numbers = numbers_of(packed)
        self.shape = Shape.of(numbers)
        self.num_ids = [own[0] for own in numbers]
        self.register_buffer("numbers", torch.tensor(numbers))

    @torch.compiler.disable
    def forward(
        self, values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `PackedLookup`.

        Raises:
            ValueError: tensors of other types, numbers or devices than it takes, export, and
                without `ignores` lengths that do not fit or ids out of bounds.
            RuntimeError: Triton's kernels do not run on the device, with the reason.
        """
        from cce_torchrec.inference.triton_lookup import NONE_FOUND, pooled

        if torch.compiler.is_exporting():
            raise ValueError(_PYTHON_ONLY)
        check_weights(self.is_weighted, weights)
        self._check(values, lengths, weights)
        num_bags = lengths.numel() // self.num_inputs
        shape = num_bags, self.total_dim
        out = torch.empty(shape, dtype=torch.float32, device=values.device)
        if not num_bags:
            return out
        values, lengths, found = values.contiguous(), lengths.contiguous(), None
        if weights is not None:
            weights = weights.detach().float().contiguous()
        if not self.ignores:
            found = torch.full((2,), NONE_FOUND, dtype=torch.int64, device=values.device)
        pooled(
            self.shape,
            values,
            lengths,
            weights,
            codes=self.codes,
            rows=self.rows,
            numbers=self.numbers,
            hashes=self.hashes,
            out=out,
            found=found,
        )
        if found is not None:
            bag, place = found.tolist()  # which waits for the kernel
            if bag != NONE_FOUND:
                _refuse_lengths(bag, lengths, values.numel())
            if place != NONE_FOUND:
                self._refuse(place, values)
        return out

    def _check(
        self, values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None
    ) -> None:
        """Raises what the host knows without the device."""
        why = unusable(values.device)
        if why is not None:
            raise RuntimeError(f"{why}; or make the collection with lookup='auto', for CPUs")
        if any(t.dtype not in _WHOLE or t.dim() != 1 for t in (values, lengths)):
            raise ValueError(
                f"values and lengths must be int32 or int64 [n]; got {values.dtype} "
                f"{list(values.shape)} and {lengths.dtype} {list(lengths.shape)}"
            )
        batch = [values, lengths] if weights is None else [values, lengths, weights]
        devices = {tensor.device for tensor in (self.rows, *batch)}
        if len(devices) > 1:
            raise ValueError(
                f"the tables are on {self.rows.device}, and the batch is on "
                f"{', '.join(sorted({str(tensor.device) for tensor in batch}))}; move both to one "
                "device (collection.to(device), features.to(device))"
            )
        if lengths.numel() % self.num_inputs:
            raise ValueError(
                f"{lengths.numel()} lengths are no batch of {self.num_inputs} features"
            )
        if not lengths.numel() and values.numel():
            raise ValueError(f"lengths add up to 0, and {values.numel()} values were given")
        if weights is not None and weights.numel() != values.numel():
            raise ValueError(f"{weights.numel()} weights for {values.numel()} values")

    def _refuse(self, place: int, values: torch.Tensor) -> NoReturn:
        """Raises ValueError for the id at `place`, feature * V + its position."""
        feature, at = divmod(place, values.numel())
        raise ValueError(
            f"{self.names[feature]}: id {int(values[at])} is outside [0, {self.num_ids[feature]}); "
            "map the ids into range, or export with ignores=True, which reads id 0 instead"
        )

    def __prepare_scriptable__(self) -> NoReturn:
        # What torch.jit.script asks for in place of a module.
        raise ValueError(_PYTHON_ONLY)


def _refuse_lengths(bag: int, lengths: torch.Tensor, num_values: int) -> NoReturn:
    """Raises ValueError for the length of `bag`, or if it is beyond them for their sum."""
    if bag < lengths.numel():
        raise ValueError(
            f"length {int(lengths[bag])} of bag {bag} is negative, or more than what is left of "
            f"the {num_values} values"
        )
    raise ValueError(f"lengths add up to {int(lengths.sum())}, and {num_values} values were given")


def check_scriptable(served: Any) -> None:
    """Raises ValueError if a lookup in `served` runs in Python alone."""
    if any(isinstance(module, TritonLookup) for module in served.modules()):
        raise ValueError(_PYTHON_ONLY)
