"""What a layer of two models gives for the same examples, and how far it agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cce_torchrec.alignment.ids import draw_hash
from cce_torchrec.alignment.measures import GROUPS, SAMPLE, Alignment, all_measures
from cce_torchrec.alignment.moments import grouped_moments
from cce_torchrec.alignment.neighbours import neighbourhoods
from cce_torchrec.collectives import gather, ranks_of_call

_KEYS = 1 << 31
"""Below which hashes are by which examples are drawn."""


def align_activations(
    a: nn.Module,
    b: nn.Module,
    batches: Iterable[Any],
    *,
    layer: str | tuple[str, str] = "",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    k: int = 10,
    sample: int = SAMPLE,
    process_group: dist.ProcessGroup | None = None,
) -> Alignment:
    """All measures of alignment between what a layer of two models gives for the same examples.

    Both models run every batch once, in evaluation mode and without gradients, and are then as they
    were. Activations are added up and not kept, but for `sample` examples drawn by a hash.
    Collective where there is a process group: each rank gives batches of its own.

    Args:
        a: a model.
        b: another one, or the same one.
        batches: of examples, as the models want them.
        layer: name of the submodule whose output is compared, as `named_modules()` has it, or one
            of each model; "" is the model itself. An output is a tensor [examples, ...], whose
            further dimensions become one, a `KeyedTensor`, or has one of these first.
        forward: what runs a model on a batch; default: `model(batch)`.
        k: neighbours of an example.
        sample: examples whose neighbours are looked at.
        process_group: ranks with batches each; default: all of the job.

    Raises:
        ValueError: no such layer, a layer that gives no tensor of examples or is not run once a
            batch, unequal numbers of examples, fewer than two, constant vectors, or values that are
            not finite.
    """
    group = ranks_of_call(process_group)
    names = (layer, layer) if isinstance(layer, str) else layer
    sides = [_Layer(model, name) for model, name in zip((a, b), names, strict=True)]
    run = forward or (lambda model, batch: model(batch))
    drawn = _Drawn(sample, group)

    def blocks() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in batches:
            x, y = (side.of(batch, run) for side in sides)
            y = y.to(x.device)
            if len(x) != len(y):
                raise ValueError(f"the models give {len(x)} and {len(y)} examples for a batch")
            drawn.add(x, y)
            # Each batch has some of every part of the examples, by which intervals are found.
            size = max(1, -(-len(x) // GROUPS))
            yield from zip(x.split(size), y.split(size), strict=True)

    parts = grouped_moments(blocks(), GROUPS, group)
    x, y = drawn.of_all_ranks()
    near = neighbourhoods(x, y, k) if len(x) >= k + 2 else None
    return all_measures(parts, near)


class _Layer:
    """A layer of a model, whose output is caught."""

    def __init__(self, model: nn.Module, name: str) -> None:
        modules = dict(model.named_modules())
        if name not in modules:
            raise ValueError(f"there is no layer {name!r}; there are {list(modules)[1:]}")
        self._model, self._layer, self._name = model, modules[name], name

    @torch.no_grad()
    def of(self, batch: Any, run: Callable[[nn.Module, Any], Any]) -> torch.Tensor:
        """The output [examples, width] for `batch`."""
        found: list[Any] = []
        handle = self._layer.register_forward_hook(lambda _module, _inputs, out: found.append(out))
        # By module: a user may have frozen some in evaluation mode, and gets them back so.
        training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        try:
            run(self._model, batch)
        finally:
            handle.remove()
            for module in training:
                module.training = True
        if len(found) != 1:
            raise ValueError(f"layer {self._name!r} ran {len(found)} times for a batch, not once")
        return _matrix(found[0], self._name)


def _matrix(out: Any, name: str) -> torch.Tensor:
    out = out.wait() if hasattr(out, "wait") else out  # of sharded collections
    if isinstance(out, tuple | list) and out:
        out = out[0]
    if hasattr(out, "to_dict") and hasattr(out, "values"):
        out = out.values()
    if not isinstance(out, torch.Tensor) or out.dim() < 1 or not out.is_floating_point():
        what = f"{out.dtype} of {out.dim()}" if isinstance(out, torch.Tensor) else type(out)
        raise ValueError(f"layer {name!r} gives no floating-point tensor of examples, but {what}")
    out = out.detach().flatten(1) if out.dim() > 1 else out.detach()[:, None]
    return out if out.dtype == torch.float64 else out.float()


class _Drawn:
    """Examples with the smallest hashes of their numbers, of all that were added."""

    def __init__(self, size: int, group: dist.ProcessGroup | None) -> None:
        self._size, self._group = size, group
        alone = group is None
        self._rank = 0 if alone else dist.get_rank(group)
        self._ranks = 1 if alone else dist.get_world_size(group)
        self._seen = 0
        self._keys = torch.zeros(0, dtype=torch.int64)
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds examples by what both models gave, [n, p] and [n, q]."""
        # Numbers that no other rank has, so that ranks draw from one list of examples.
        numbers = (self._seen + torch.arange(len(x))) * self._ranks + self._rank
        self._seen += len(x)
        own = x.cpu(), y.cpu()
        before = self._pair or (own[0][:0], own[1][:0])
        keys = torch.cat([self._keys, draw_hash(numbers, _KEYS)])
        kept = keys.argsort(stable=True)[: self._size]
        first, second = (torch.cat(pair)[kept] for pair in zip(before, own, strict=True))
        self._keys, self._pair = keys[kept], (first, second)

    def of_all_ranks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of all ranks, [at most size, p] and [.., q]. Collective."""
        found = gather((self._keys, self._pair), self._group)
        kept = torch.cat([keys for keys, _ in found]).argsort(stable=True)[: self._size]
        pairs = [pair for _, pair in found if pair is not None]
        x, y = (torch.cat(side)[kept] for side in zip(*pairs, strict=True))
        return x, y
