"""How far a job was when it saved a checkpoint, as `TrainingProgress` keeps it beside the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from cce_torchrec.checkpoint.info import checkpoint_info
from cce_torchrec.checkpoint.schedulers import saved_schedulers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SavedProgress:
    """What a checkpoint says; of one that `save_checkpoint` alone wrote its step, and no lengths.

    Raises:
        ValueError: a number of steps or epochs, or schedulers, that no job of this form has saved.
    """

    path: Path = Path()
    step: int = 0
    epochs: int = 0
    """0 if it is not known."""
    steps_per_epoch: int = 0
    """0 if it is not known."""
    schedulers: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def latest(cls, folder: str | Path) -> SavedProgress:
        """What the latest checkpoint in `folder` says.

        Raises:
            ValueError: there is none, or see the class.
        """
        info = checkpoint_info(folder)
        extra = info.extra or {}
        # `save_checkpoint` takes any `extra`, whose names may mean something else.
        for name in ("epochs", "steps_per_epoch"):
            if name in extra and (type(extra[name]) is not int or extra[name] < 1):
                raise _foreign(info.path, name, extra[name])
        schedulers = extra.get("schedulers", [])
        whole = isinstance(schedulers, list) and all(_is_scheduler(one) for one in schedulers)
        if not whole:
            raise _foreign(info.path, "schedulers", schedulers)
        return cls(
            path=info.path,
            step=info.step,
            epochs=extra.get("epochs", 0),
            steps_per_epoch=extra.get("steps_per_epoch", 0),
            schedulers=schedulers,
        )

    def step_now(self, steps_per_epoch: int) -> int:
        """The step that this is where an epoch has `steps_per_epoch`."""
        # With other ranks or batch sizes as many steps would be another part of the data.
        return self.step * steps_per_epoch // (self.steps_per_epoch or steps_per_epoch)

    def tell_of_changes(
        self, epochs: int, steps_per_epoch: int, schedulers: Sequence[LRScheduler]
    ) -> None:
        """Logs what is not as it was in a job that goes on with `epochs`, 0 for none."""
        before, now = self.steps_per_epoch or steps_per_epoch, steps_per_epoch
        if before != now:
            logger.warning(
                "%s: an epoch had %d steps, and has %d: step %d is step %d now",
                self.path, before, now, self.step, self.step_now(now),
            )  # fmt: skip
        old, new = before * (self.epochs or epochs), now * epochs
        if epochs and old != new and schedulers:
            logger.warning(
                "%s: the job had %d steps (%d epochs of %d), and has %d (%d of %d); schedulers %s "
                "go on as they were made for the former, their lengths and milestones included; "
                "what is to be otherwise, set on them once TrainingProgress is made",
                self.path, old, self.epochs or epochs, before, new, epochs, now,
                [type(one).__name__ for one in schedulers],
            )  # fmt: skip


NOTHING_SAVED = SavedProgress()


def saved_extra(
    epochs: int, steps_per_epoch: int, schedulers: Sequence[LRScheduler]
) -> dict[str, Any]:
    """What `SavedProgress.latest` reads, beside the step."""
    lengths = {"epochs": epochs, "steps_per_epoch": steps_per_epoch}
    return {**lengths, "schedulers": saved_schedulers(schedulers)}


def _is_scheduler(one: Any) -> bool:
    """Whether it has the form of what `saved_schedulers` gives."""
    return isinstance(one, dict) and isinstance(one.get("state"), dict) and "kind" in one


def _foreign(path: Path, name: str, value: Any) -> ValueError:
    return ValueError(
        f"{path}: its extra has {name} {value!r}, which no TrainingProgress has saved; load it by "
        "load_checkpoint into the model of a job with another folder"
    )
