"""What of a model and of a checkpoint belongs together, and what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata


@dataclass(kw_only=True)
class Matching:
    """What of the model and of the checkpoint belongs together, as far as one rank has seen.

    Tables are named as `collection.table`, all other state as in the state dict.
    """

    loaded: set[str] = field(default_factory=set)
    grown: set[str] = field(default_factory=set)
    new: set[str] = field(default_factory=set)
    """What the checkpoint lacks."""
    missing: set[str] = field(default_factory=set)
    """What the model lacks."""
    conflicts: dict[str, str] = field(default_factory=dict)
    """What differs, with what the checkpoint has and what the model has."""

    @property
    def left_out(self) -> set[str]:
        """What is on one side alone, or on both sides and differs."""
        return self.new | self.missing | self.conflicts.keys()

    def add(self, others: Iterable[Matching]) -> None:
        """Adds what other ranks have seen."""
        for other in others:
            self.loaded |= other.loaded
            self.grown |= other.grown
            self.new |= other.new
            self.missing |= other.missing
            self.conflicts.update(other.conflicts)
        self.loaded -= self.left_out

    def refuse_nothing(self, path: Path) -> None:
        """Raises ValueError if nothing of the checkpoint at `path` is loaded."""
        if not self.loaded and self.left_out:
            raise ValueError(
                f"{path} is of another model, and nothing matches: it has {shown(self.missing)} "
                f"that the model lacks, the model has {shown(self.new)} that it lacks, and "
                f"{shown(self.conflicts)} differ; load another checkpoint"
            )


def match_state(
    stored: dict[str, Any],
    state: dict[str, Any],
    everywhere: set[str],
    called: Callable[[str], str],
    *,
    strict: bool,
) -> Matching:
    """Compares names and shapes of the model's state with the checkpoint's.

    Args:
        stored: what the checkpoint says of each tensor and object.
        state: of the model on this rank, by the same keys.
        everywhere: the keys on all ranks.
        called: what a report calls that which a key is of: a table, or the rest of the key.
        strict: refuse what does not match.

    Raises:
        ValueError: naming what is on one side alone, or what differs and how.
    """
    new, missing = everywhere - set(stored), set(stored) - everywhere
    if strict and (new or missing):
        raise ValueError(
            f"the model has {shown(new)} that the checkpoint lacks, and the checkpoint has "
            f"{shown(missing)} that the model lacks; pass tables=[...] to load some tables only, "
            "or strict=False to load what matches"
        )
    found = Matching(new=set(map(called, new)), missing=set(map(called, missing)))
    for key in state.keys() - new:
        value, kept = state[key], stored[key]
        there = "an object" if isinstance(kept, BytesStorageMetadata) else list(kept.size)
        here = list(value.size()) if hasattr(value, "size") else "an object"
        if there == here:
            found.loaded.add(called(key))
            continue
        difference = f"shape {there} in the checkpoint, {here} in the model"
        if strict:
            raise ValueError(
                f"{key.removeprefix('model.')}: {difference}; configure it as it was saved, or "
                "pass strict=False to load what matches"
            )
        found.conflicts[called(key)] = difference
    return found


def shown(names: Iterable[str]) -> str:
    """The first of `names`, in their order, and how many more there are."""
    keys = sorted(names)
    first = ", ".join(key.removeprefix("model.") for key in keys[:3])
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"[{first}{more}]"
