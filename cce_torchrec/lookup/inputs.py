"""What a collection takes for a batch: checked before ids are read, as kernels trust it.

TorchRec validates the first batch of a sharded pooled collection, and its unsharded ones fail
inside torch where a batch does not fit together. FBGEMM's lookups and the expansion go by lengths,
and would read other memory. On a CPU every batch is checked whole. On a GPU what the host knows is,
as to ask for lengths would wait for the device; there the kernel bounds what it reads and writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.sparse.jagged_tensor_validator import validate_keyed_jagged_tensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from cce_torchrec.lookup.bags import count_bags
from cce_torchrec.lookup.features import INDICES, remade
from cce_torchrec.table import TableFeature

_SHORT = (torch.int16, torch.uint8, torch.int8, torch.bool)
"""Integers that TorchRec's unsharded collections look up too; gloo sends not all of them."""


class InputCheck:
    """Checks the batches of one collection, whatever its lookup will be.

    Args:
        slots: the features that it reads.
        is_weighted: whether it pools by weights.
    """

    def __init__(self, slots: Sequence[TableFeature], is_weighted: bool) -> None:
        self._slots = slots
        self._features = frozenset(slot.feature for slot in slots)
        self._is_weighted = is_weighted
        self.needs_weights = is_weighted
        """Whether batches must have weights already; not where feature processors make them."""

    def first(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The same of a first batch, by TorchRec's validation too: waits for a GPU.

        Raises:
            ValueError: also for values beyond the last bag, which later batches may have.
        """
        checked = self(features, waits=True)
        validate_keyed_jagged_tensor(self._of_tensor_dict(features))
        return checked

    def __call__(self, features: KeyedJaggedTensor, waits: bool = False) -> KeyedJaggedTensor:
        """`features` as lookups take them: ids, bags and weights that fit together.

        Nothing of `features` is written to. Weights that nothing is pooled by are left out.

        Args:
            features: a batch; also a TensorDict of JaggedTensors, as TorchRec's collections take.
            waits: whether a GPU may be waited for.

        Raises:
            ValueError: naming features and tables, what does not fit, and what to do.
        """
        features = self._of_tensor_dict(features)
        self._check_keys(features.keys())
        if features.variable_stride_per_key():
            self._check_examples(features)
        features = self._in_types(features)
        if torch.compiler.is_compiling():
            # To look at data would end the graph; an expansion in one writes all that it hands on.
            return features
        self._check_bags(features)
        if waits or features.values().device.type == "cpu":
            return self._whole(features)
        known = features.length_per_key_or_none()
        if known is not None:
            _check_starts(features, known)
            _check_total(features, known)
        return features

    def _of_tensor_dict(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        if isinstance(features, KeyedJaggedTensor):
            return features
        if not isinstance(features, TensorDict):
            raise ValueError(
                f"features {self.named} are looked up by a KeyedJaggedTensor or a "
                f"TensorDict of JaggedTensors; got {type(features)}"
            )
        # What the collection reads alone, as a TensorDict may have dense features too.
        keys = [str(key) for key in features.keys() if key in self._features]  # noqa: SIM118  # it iterates over examples
        self._check_keys(keys)
        given = {key: features[key] for key in keys}
        for key, own in given.items():
            nested = isinstance(own, torch.Tensor) and own.is_nested
            if not isinstance(own, JaggedTensor) and not nested:
                raise ValueError(
                    f"feature {self._named([key])} of the TensorDict is {type(own)}; give a "
                    "JaggedTensor, or torch.nested.nested_tensor(..., layout=torch.jagged)"
                )
        if self.needs_weights:
            raise ValueError(
                f"features {self.named}: the collection was made with is_weighted=True, and "
                "TorchRec takes no weights from a TensorDict; give "
                "KeyedJaggedTensor.from_jt_dict(...) with them"
            )
        made = maybe_td_to_kjt(features, keys)
        # Their values stand in a row, where only lengths would tell whose an id is.
        return remade(made, made.values(), None, [len(own.values()) for own in given.values()])

    @property
    def named(self) -> str:
        """The features that the collection reads, each with its tables."""
        return self._named(self._features)

    def _named(self, features: Sequence[str] | frozenset[str]) -> str:
        """`features`, each with the tables that read it."""
        tables = {
            name: [slot.table for slot in self._slots if slot.feature == name]
            for name in sorted(features)
        }
        return ", ".join(
            f"{name!r} (table {', '.join(map(repr, own))})" if own else repr(name)
            for name, own in tables.items()
        )

    def _check_keys(self, keys: Sequence[str]) -> None:
        missing = self._features.difference(keys)
        if missing:
            named = ", ".join(
                f"{s.feature!r} (table {s.table!r})" for s in self._slots if s.feature in missing
            )
            raise ValueError(f"the KeyedJaggedTensor lacks features {named}; it has {sorted(keys)}")
        if len(set(keys)) < len(keys):
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise ValueError(
                f"the KeyedJaggedTensor has features {self._named(twice)} more than once, and keys "
                "must be unique; give all ids of an example in one bag"
            )

    def _check_examples(self, features: KeyedJaggedTensor) -> None:
        inverse = features.inverse_indices_or_none()
        lacking = sorted(self._features - set(inverse[0] if inverse else ()))
        if lacking:
            raise ValueError(
                "the KeyedJaggedTensor has a batch size per feature, but no inverse_indices for "
                f"{lacking}; give (names, [features, batch size]), the bag of each example"
            )

    def _in_types(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """`features` with ids, weights and bags in types and strides that lookups take."""
        ids, given = features.values(), features.weights_or_none()
        if ids.dtype not in INDICES and ids.dtype not in _SHORT:
            raise ValueError(
                f"ids of features {self.named} are {ids.dtype}, and lookups take "
                "integers; convert them by ids.long()"
            )
        if ids.dim() != 1:
            raise ValueError(
                f"ids of features {self.named} have shape {list(ids.shape)}, and "
                "bags have them one after the other; give ids.flatten()"
            )
        weights = self._weights(features, given) if self._is_weighted else None
        bags = [
            t for t in (features.lengths_or_none(), features.offsets_or_none()) if t is not None
        ]
        if not bags:
            raise ValueError(f"features {self.named} have neither lengths nor offsets; give one")
        fits = ids.dtype in INDICES and ids.is_contiguous() and weights is given
        if fits and all(_in_a_row(t) for t in bags):
            return features
        ids = ids.long() if ids.dtype in _SHORT else ids
        return remade(features, ids, weights, features.length_per_key_or_none())

    def _weights(
        self, features: KeyedJaggedTensor, weights: torch.Tensor | None
    ) -> torch.Tensor | None:
        ids = features.values()
        if weights is None:
            if not self.needs_weights:
                return None
            raise ValueError(
                f"features {self.named}: the collection was made with "
                "is_weighted=True, but the KeyedJaggedTensor has no weights"
            )
        if weights.shape != ids.shape or weights.device != ids.device:
            raise ValueError(
                f"weights of features {self.named} have shape "
                f"{list(weights.shape)} on {weights.device}, and ids {list(ids.shape)} on "
                f"{ids.device}; give a weight for each id"
            )
        if not weights.is_floating_point():
            raise ValueError(
                f"weights of features {self.named} are {weights.dtype}, which "
                "sharded lookups would leave out; convert them by weights.float()"
            )
        return weights

    def _check_bags(self, features: KeyedJaggedTensor) -> None:
        """Refuses other numbers of bags than batch sizes say; looks at no data."""
        keys, sizes = features.keys(), features.stride_per_key()
        stride, variable = features.stride(), features.variable_stride_per_key()
        fits = len(sizes) == len(keys) and min(sizes, default=0) >= 0
        if not fits or not (variable or sizes == [stride] * len(keys)):
            raise ValueError(
                f"batch sizes {sizes} are not those of features {keys}; give one stride, or "
                "stride_per_key_per_rank with a row for each feature"
            )
        lengths, offsets = features.lengths_or_none(), features.offsets_or_none()
        bags = [] if lengths is None else [lengths.numel()]
        if offsets is not None:
            bags.append(max(offsets.numel() - 1, 0))  # without bags there may be no offset at all
        if any(count != sum(sizes) for count in bags):
            raise ValueError(
                f"features {keys} have {bags[0]} bags, but {sum(sizes)} by their batch sizes "
                f"{sizes}; give a length for each bag, or one offset more"
            )
        if features.inverse_indices_or_none() is not None and not variable:
            raise ValueError(
                f"features {keys} have inverse_indices and one batch size, so that each example "
                "has its own bag already; leave them out, or give stride_per_key_per_rank"
            )

    def _whole(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """`features` after a look at all lengths, without ids of no bag."""
        given, offsets = features.lengths_or_none(), features.offsets_or_none()
        if offsets is not None and offsets.numel():
            first = int(offsets[0])
            if first != 0:
                raise ValueError(
                    f"features {features.keys()}: Expected first offset to be 0, but got {first} "
                    "instead; offsets count from the first id"
                )
            if given is not None and not torch.equal(offsets.diff().long(), given.long()):
                raise ValueError(
                    f"features {features.keys()}: offsets is not equal to the cumulative sum of "
                    "lengths; give one of both"
                )
        per_key, low, high = count_bags(features.lengths(), features.stride_per_key())
        # Also too long ones, as a sum of huge lengths wraps in int64 and may be small.
        if low < 0 or high > features.values().numel():
            self._refuse_length(features, low if low < 0 else high)
        _check_total(features, per_key)
        known = features.length_per_key_or_none()
        if known is not None and list(known) != per_key:
            raise ValueError(
                f"length_per_key {list(known)} of features {features.keys()} is not what their "
                f"lengths add up to, {per_key}; leave it out, or give each feature its own ids"
            )
        _check_starts(features, per_key)
        self._check_inverse_indices(features)
        total, weights = sum(per_key), features.weights_or_none()
        if known is not None and offsets is None and total == features.values().numel():
            return features
        # By what was checked alone: nothing else that a caller may have put in, or TorchRec has
        # cached, is read further on.
        weights = None if weights is None else weights[:total]
        return remade(features, features.values()[:total], weights, per_key)

    def _refuse_length(self, features: KeyedJaggedTensor, wrong: int) -> None:
        """Raises for the first bag of length `wrong`, which no bag can have."""
        at = int((features.lengths() == wrong).nonzero()[0])
        ends = itertools.accumulate(features.stride_per_key())
        name = next(k for k, end in zip(features.keys(), ends, strict=True) if at < end)
        raise ValueError(
            f"feature {self._named([name])}: a bag has length {wrong}, in a batch of "
            f"{features.values().numel()} ids. Sum of lengths must equal the number of values, and "
            "none is negative"
        )

    def _check_inverse_indices(self, features: KeyedJaggedTensor) -> None:
        """Refuses bags of examples that there are not."""
        inverse = features.inverse_indices_or_none()
        if inverse is None:
            return
        names, bags = inverse
        if bags.dim() != 2 or len(bags) != len(names) or bags.dtype not in INDICES:
            raise ValueError(
                f"inverse_indices of features {names} are {bags.dtype} {list(bags.shape)}; give "
                "int64 [features, batch size]"
            )
        sizes = dict(zip(features.keys(), features.stride_per_key(), strict=True))
        for name in sorted(self._features) if bags.numel() else ():
            low, high = (int(bound) for bound in bags[names.index(name)].aminmax())
            if low < 0 or high >= sizes[name]:
                raise ValueError(
                    f"feature {self._named([name])}: inverse_indices have bag "
                    f"{low if low < 0 else high}, and the batch has {sizes[name]} bags of it"
                )


def _in_a_row(bags: torch.Tensor) -> bool:
    """Whether kernels can read `bags` as they are."""
    return bags.dtype in INDICES and bags.dim() == 1 and bags.is_contiguous()


def _check_total(features: KeyedJaggedTensor, per_key: Sequence[int]) -> None:
    """Refuses features that have more ids, by their lengths, than there are."""
    total, count = sum(per_key), features.values().numel()
    if total > count or min(per_key, default=0) < 0:
        raise ValueError(
            f"Sum of lengths must equal the number of values, but got {total} and {count}: "
            f"features {features.keys()} have {list(per_key)} ids by their lengths"
        )


def _check_starts(features: KeyedJaggedTensor, per_key: Sequence[int]) -> None:
    """Refuses positions of features that are not those after ids `per_key`."""
    starts = features.offset_per_key_or_none()
    if len(per_key) != len(features.keys()) or (
        starts is not None and list(starts) != list(itertools.accumulate(per_key, initial=0))
    ):
        raise ValueError(
            f"offset_per_key {starts} of features {features.keys()} does not follow from ids per "
            f"feature {list(per_key)}; leave out both"
        )
