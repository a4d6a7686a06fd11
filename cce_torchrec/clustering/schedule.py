"""When to cluster."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ClusteringSchedule:
    """Decides after which optimizer steps, counted from 1, the clustering step runs."""

    steps: frozenset[int] = field(default_factory=frozenset)
    interval: int = 0

    def __post_init__(self) -> None:
        never = sorted(step for step in self.steps if step < 1)
        if never or self.interval < 0:
            raise ValueError(
                f"steps {never} and interval {self.interval}: steps count from 1, and an interval "
                "is 1 or more, or 0 for none; after others nothing would ever cluster"
            )

    def due(self, step: int) -> bool:
        """Whether to cluster after step `step`."""
        return step in self.steps or (self.interval > 0 and step % self.interval == 0)

    def is_last(self, step: int, total_steps: int) -> bool:
        """Whether the clustering after step `step` is the last of a run of `total_steps` steps.

        `finalize` takes the place of `cluster` there. It is False where none is due after `step`,
        so a schedule that never clusters has no last one.
        """
        if not (self.due(step) and step <= total_steps):
            return False
        latest = total_steps - total_steps % self.interval if self.interval else 0
        return step == max([latest, *(one for one in self.steps if one <= total_steps)])

    @classmethod
    def evenly(
        cls, total_steps: int, clusterings: int = 18, until: float = 0.9
    ) -> ClusteringSchedule:
        """`clusterings` times, evenly spread to the share `until` of `total_steps` (default).

        18 suits several epochs and 8 a single pass. Fewer steps than clusterings give one a step.
        """
        if total_steps < 1 or clusterings < 0 or not 0 < until <= 1:
            raise ValueError(
                f"cannot spread {clusterings} clusterings over {until} of {total_steps} steps; "
                "steps must be positive and the share in (0, 1]"
            )
        # The end of a run only trains: the best last clustering of those measured came before it.
        last = until * total_steps
        # A set: where there are fewer steps than clusterings, several fall on one.
        steps = {round(last * (i + 1) / clusterings) for i in range(clusterings)} - {0}
        if clusterings and not steps:
            raise ValueError(
                f"the first {until} of {total_steps} steps has no step for {clusterings} "
                "clusterings; raise until, or use never()"
            )
        return cls(steps=frozenset(steps))

    @classmethod
    def every(cls, steps: int) -> ClusteringSchedule:
        """After every `steps` steps."""
        if steps < 1:
            raise ValueError(f"cannot cluster every {steps} steps; use at least 1, or never()")
        return cls(interval=steps)

    @classmethod
    def at_epochs(cls, epochs: list[int], steps_per_epoch: int) -> ClusteringSchedule:
        """At the end of each of `epochs`, counted from 1."""
        if steps_per_epoch < 1 or not epochs or any(epoch < 1 for epoch in epochs):
            raise ValueError(
                f"epochs {epochs} of {steps_per_epoch} steps: both count from 1, and no epoch at "
                "all is never()"
            )
        return cls(steps=frozenset(epoch * steps_per_epoch for epoch in epochs))

    @classmethod
    def never(cls) -> ClusteringSchedule:
        """Not at all."""
        return cls()
