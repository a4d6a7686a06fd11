"""When to cluster."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from cce_torchrec.clustering.finalizing import finalize
from cce_torchrec.clustering.report import ClusteringReport
from cce_torchrec.clustering.step import cluster
from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.config_checks import finite_number, whole_number

_AN_EPOCH, _LEAST, _UNTIL = 4, 8, 0.8
"""Clusterings of frequent ids an epoch, at least, and until which share of training."""
_RARE_SHARE = 0.3
"""After which share of a single pass rare ids are clustered."""
_RESTARTED_BELOW = 1.25
"""Parameters an id below which a restart in a single pass gains more than it costs."""


@dataclass(frozen=True)
class ClusteringSchedule:
    """Decides after which optimizer steps, counted from 1, the clustering step runs."""

    steps: frozenset[int] = field(default_factory=frozenset)
    interval: int = 0
    final: int = 0
    """The step after which `finalize` takes the place of `cluster`, the last of all; 0: none."""
    rare: frozenset[int] | None = None
    """The steps after which tables of the recipe "rare" are clustered; None: with all others."""

    def __post_init__(self) -> None:
        # As Python's numbers, in a set that stays as it is: a checkpoint and other ranks have it.
        try:
            numbers = {
                "steps": frozenset(map(operator.index, self.steps)),
                "interval": operator.index(self.interval),
                "final": operator.index(self.final),
            }
            if self.rare is not None:
                numbers["rare"] = frozenset(map(operator.index, self.rare))
        except TypeError as error:
            raise ValueError(
                f"steps {self.steps!r}, interval {self.interval!r}, final {self.final!r} and rare "
                f"{self.rare!r} are whole numbers of steps ({error}); convert them by int()"
            ) from error
        for name, value in numbers.items():
            object.__setattr__(self, name, value)
        never = sorted(step for step in self.steps | (self.rare or set()) if step < 1)
        if never or self.interval < 0 or self.final < 0:
            raise ValueError(
                f"steps {never}, interval {self.interval} and final {self.final}: steps, those of "
                "rare ids too, count from 1, an interval or a final step is 1 or more, or 0 for "
                "none; after others nothing would ever cluster"
            )
        if self.final and self.final in (self.rare or ()):
            raise ValueError(
                f"step {self.final} is the final one, which finalizes, and one of rare: tables of "
                "rare ids would not be clustered there; give another"
            )

    def due(self, step: int) -> bool:
        """Whether to cluster after step `step`, or to finalize; never before the first step.

        Some tables at least: where ids of both kinds are there, `recipes_due` says which.
        """
        return bool(self.recipes_due(step))

    def recipes_due(self, step: int) -> frozenset[str]:
        """The recipes of the tables that are clustered after step `step`, or finalized."""
        if step < 1:
            return frozenset()
        frequent = self._frequent_due(step)
        rare = frequent if self.rare is None else step in self.rare
        return frozenset(["frequent"] * frequent + ["rare"] * rare)

    def _frequent_due(self, step: int) -> bool:
        # Finalized tables have no helper, without which there is nothing to cluster.
        if self.final and step >= self.final:
            return step == self.final
        return step in self.steps or (self.interval > 0 and step % self.interval == 0)

    def is_last(self, step: int, total_steps: int) -> bool:
        """Whether the clustering after step `step` is the last of a run of `total_steps` steps.

        `finalize` takes the place of `cluster` there. It is False where none is due after `step`,
        so a schedule that never clusters has no last one. Clusterings of rare ids alone, whose
        tables are not finalized, do not count.
        """
        if not (1 <= step <= total_steps and self._frequent_due(step)):
            return False
        # A schedule may be longer than the run.
        end = min(total_steps, self.final) if self.final else total_steps
        latest = end - end % self.interval if self.interval else 0
        return step == max([latest, *(one for one in self._listed if one <= end)])

    @property
    def _listed(self) -> frozenset[int]:
        """The steps that are named one by one, the final one among them."""
        return self.steps | ({self.final} if self.final else set())

    def cluster_if_due(
        self, model: nn.Module, step: int, **options: Any
    ) -> ClusteringReport | None:
        """Does what is due after step `step`: `cluster`, `finalize`, or nothing.

        To be called on every rank after every step. What was done is returned, None for nothing.

        Args:
            model: as of `cluster`.
            step: of the optimizer, counted from 1.
            options: of `cluster`, but `recipes`.

        Raises:
            ValueError: options that `cluster` refuses, or `recipes`.
        """
        if "recipes" in options:
            raise ValueError(
                "recipes: the schedule says which are due; leave it out, or call cluster"
            )
        recipes = self.recipes_due(step)
        if not recipes:
            return None
        if step == self.final:
            return finalize(model, **options)
        return cluster(model, recipes=recipes if self.rare is not None else None, **options)

    @classmethod
    def for_training(
        cls, epochs: int, steps_per_epoch: int, *, rare: bool = False, finalize: bool = False
    ) -> ClusteringSchedule:
        """What suits the ids: frequent ones four times an epoch, and rare ones twice.

        By default four times an epoch and 8 times at least, evenly over the first 80 % of training.
        With `rare` twice an epoch, the last time a whole epoch before the end, and in a single pass
        once, after 30 % of it: rows are then trained on every example once more. With `finalize`
        tables are finalized after 90 % of the steps, in place of a clustering that is due then.

        Args:
            epochs: of the run.
            steps_per_epoch: optimizer steps of each.
            rare: whether all CCE tables are of the recipe "rare".
            finalize: whether the last clustering is to finalize the tables.

        Raises:
            ValueError: no epoch, or none of a step, or no whole numbers of them.
        """
        epochs = whole_number("for_training", "epochs", epochs)
        steps_per_epoch = whole_number("for_training", "steps_per_epoch", steps_per_epoch)
        if epochs < 1 or steps_per_epoch < 1:
            raise ValueError(
                f"epochs {epochs} of {steps_per_epoch} steps: there is nothing to train; give 1 or "
                "more of both"
            )
        total = epochs * steps_per_epoch
        if not rare:
            count = max(_LEAST, _AN_EPOCH * epochs)
            steps = {round(_UNTIL * total * (i + 1) / count) for i in range(count)}
        elif epochs > 1:
            steps = {round(half * steps_per_epoch / 2) for half in range(1, 2 * epochs - 1)}
        else:
            steps = {round(_RARE_SHARE * steps_per_epoch)}
        steps = steps - {0} or {1}  # the first step is the earliest that is ever due
        final = max(max(steps), round(0.9 * total)) if finalize else 0
        return cls(frozenset(steps), final=final)

    @classmethod
    def for_tables(
        cls, tables: Iterable[Any], epochs: int, steps_per_epoch: int, *, finalize: bool = False
    ) -> ClusteringSchedule:
        """`for_training` of each recipe that `tables` have: the rule of the training program.

        A single pass over rare ids is left alone where no table of theirs has codes or fewer than
        1.25 parameters an id: a clustering would be a restart, which costs more than it gains.

        Args:
            tables: of all collections of a model, plain ones too.
            epochs: of the run.
            steps_per_epoch: optimizer steps of each.
            finalize: see `for_training`; tables of rare ids are not finalized.
        """
        learned = [config for config in tables if is_cce(config) and config.learned_codes]
        rare = [config for config in learned if config.recipe == "rare"]
        if not rare:
            return cls.for_training(epochs, steps_per_epoch, finalize=finalize)
        own = cls.for_training(epochs, steps_per_epoch, rare=True)
        if epochs == 1 and not any(map(_gains_in_one_pass, rare)):
            own = cls.never()
        if len(rare) == len(learned):
            return own  # of which none is ever finalized
        others = cls.for_training(epochs, steps_per_epoch, finalize=finalize)
        final = others.final
        while final and final in own.steps:  # the last of which is before the last epoch
            final += 1
        return replace(others, final=final, rare=own.steps)

    @classmethod
    def evenly(
        cls,
        total_steps: int,
        clusterings: int = 18,
        until: float = 0.9,
        *,
        finalize: bool = False,
    ) -> ClusteringSchedule:
        """`clusterings` times, evenly spread to the share `until` of `total_steps` (default).

        Fewer steps than clusterings give one a step. With `finalize` the last of them finalizes
        the tables. `for_training` chooses when.
        """
        total_steps = whole_number("evenly", "total_steps", total_steps)
        clusterings = whole_number("evenly", "clusterings", clusterings)
        finite_number("evenly", "until", until)
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
        return cls(frozenset(steps), final=_last(steps, finalize))

    @classmethod
    def every(cls, steps: int, *, final: int = 0) -> ClusteringSchedule:
        """After every `steps` steps, up to step `final`, after which tables are finalized."""
        if steps < 1:
            raise ValueError(f"cannot cluster every {steps} steps; use at least 1, or never()")
        return cls(interval=steps, final=final)

    @classmethod
    def at_epochs(
        cls, epochs: list[int], steps_per_epoch: int, *, finalize: bool = False
    ) -> ClusteringSchedule:
        """At the end of each of `epochs`, counted from 1; with `finalize` the last finalizes."""
        epochs = [whole_number("at_epochs", "an epoch", epoch) for epoch in epochs]
        steps_per_epoch = whole_number("at_epochs", "steps_per_epoch", steps_per_epoch)
        if steps_per_epoch < 1 or not epochs or any(epoch < 1 for epoch in epochs):
            raise ValueError(
                f"epochs {epochs} of {steps_per_epoch} steps: both count from 1, and no epoch at "
                "all is never()"
            )
        steps = {epoch * steps_per_epoch for epoch in epochs}
        return cls(frozenset(steps), final=_last(steps, finalize))

    @classmethod
    def never(cls) -> ClusteringSchedule:
        """Not at all."""
        return cls()


def _last(steps: Set[int], finalize: bool) -> int:
    """The last of `steps` if tables are finalized after it, otherwise 0.

    Raises:
        ValueError: there is none to finalize after.
    """
    if finalize and not steps:
        raise ValueError(
            "finalize=True and 0 clusterings: the last clustering finalizes; give 1 or more, or "
            "leave finalize out"
        )
    return max(steps) if finalize else 0


def _gains_in_one_pass(config: CCEEmbeddingBagConfig) -> bool:
    """Whether a single clustering is worth what the pass loses by it, of a table of rare ids."""
    parameters = config.helper_rows * config.embedding_dim
    return config.code_bits > 0 or parameters < _RESTARTED_BELOW * config.num_embeddings
