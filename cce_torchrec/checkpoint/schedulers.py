"""How far schedulers of learning rates are, as a checkpoint keeps it beside the optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from cce_torchrec.checkpoint.plain import plain

_PAIRS = "pairs"
"""A dictionary whose keys are no text, as JSON needs it: its items in a list."""


def saved_schedulers(schedulers: Sequence[LRScheduler]) -> list[Any]:
    """Class and state of each of `schedulers`, as JSON has it.

    Raises:
        ValueError: JSON does not hold something that a scheduler keeps.
    """
    found = []
    for place, scheduler in enumerate(schedulers):
        name = type(scheduler).__name__
        state = {
            key: plain(f"schedulers[{place}], a {name}, keeps {key!r}", _as_json(value))
            for key, value in scheduler.state_dict().items()
        }
        found.append({"kind": name, "state": state})
    return found


def loader(schedulers: Sequence[LRScheduler], saved: Sequence[Any]) -> Callable[[], None]:
    """What gives `schedulers` the state that was `saved`, checked before anything is loaded.

    Raises:
        ValueError: other schedulers were saved.
    """
    kinds = [type(scheduler).__name__ for scheduler in schedulers]
    saved_kinds = [one["kind"] for one in saved]
    if kinds != saved_kinds:
        raise ValueError(
            f"the checkpoint has the schedulers {saved_kinds}, and the job {kinds}; give the same "
            "ones in the same order, or save into another folder"
        )
    states = [
        _like(scheduler.state_dict(), one["state"])
        for scheduler, one in zip(schedulers, saved, strict=True)
    ]

    def load() -> None:
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)

    return load


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _as_json(one) for key, one in value.items()}
        # `MultiStepLR` counts its milestones, numbers, of which JSON would make text.
        return {_PAIRS: [[key, _as_json(one)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    try:
        return value.item()  # rates that are tensors, or numbers of NumPy's
    except (AttributeError, RuntimeError, ValueError):
        return value


def _like(own: Any, saved: Any) -> Any:
    """`saved` in the types that the scheduler has for it in `own`."""
    if isinstance(saved, dict):
        if saved.keys() == {_PAIRS}:
            kind = type(own) if isinstance(own, dict) else dict
            return kind({key: _like(None, one) for key, one in saved[_PAIRS]})
        # What the scheduler has not, it has not used yet: as it was saved.
        inner = own if isinstance(own, Mapping) else {}
        return {key: _like(inner.get(key), one) for key, one in saved.items()}
    if isinstance(saved, list):
        inside = own if isinstance(own, list | tuple) and len(own) == len(saved) else saved
        made = [_like(a, b) for a, b in zip(inside, saved, strict=True)]
        return tuple(made) if isinstance(own, tuple) else made
    return saved
