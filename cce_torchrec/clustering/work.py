"""The two halves of a clustering step, over all chunks that a rank takes part in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from cce_torchrec.bars import bar
from cce_torchrec.clustering.chunk_group import ALONE, ChunkGroup
from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.chunk_update import ChunkUpdate
from cce_torchrec.clustering.options import Options
from cce_torchrec.clustering.plan import Plan
from cce_torchrec.clustering.solver import ChunkSolver, ScoringHelper
from cce_torchrec.clustering.task import ChunkKey
from cce_torchrec.codes.chunk_codes import ChunkCodes
from cce_torchrec.collectives import agree, gather, reason
from cce_torchrec.packing import CodePacking
from cce_torchrec.spans import span

Done = dict[ChunkKey, tuple[ChunkUpdate, float]]
"""Updates of the chunks that this rank has, and their seconds."""


@dataclass
class Work:
    """The two halves of a step: all that can fail, then the writes."""

    mine: dict[ChunkKey, ChunkState]
    plan: Plan
    kept: set[ChunkKey]
    options: Options
    device: torch.device
    group: dist.ProcessGroup | None

    def _scorers(self, key: ChunkKey) -> ChunkGroup:
        if key in self.plan.row_wise:
            return self.mine[key].holders
        if key in self.plan.common:
            return ChunkGroup(self.group, self.plan.owner[key], self.device)
        return replace(ALONE, device=self.device)

    def _solver(self, key: ChunkKey) -> ChunkSolver:
        task = self.plan.tasks[key]
        return ChunkSolver(self.mine[key], task, self.options, self._scorers(key))

    def _helper(self, key: ChunkKey) -> ScoringHelper:
        return ScoringHelper(self.plan.tasks[key], self.options, self._scorers(key))

    def solve(self) -> Done:
        """Writes nothing."""
        done: Done = {}
        # Chunks of one rank alone come first: nobody waits for them.
        plan = self.plan
        chunks = [*plan.alone, *plan.common, *plan.row_wise]
        shown = bar(len(chunks), "clustering", "chunk")

        def solve(key: ChunkKey) -> None:
            started, keep = time.perf_counter(), key in self.kept
            try:
                with span(f"{self.plan.tasks[key].span}, solve"):
                    if key in self.mine:
                        update = self._solver(key).solve(keep)
                        done[key] = (update, time.perf_counter() - started)
                    else:
                        self._helper(key).solve(keep)
            except Exception as error:
                raise ValueError(f"{self.plan.tasks[key].name}: {reason(error)}") from error
            shown.update()

        def solve_own() -> tuple[None, None]:
            for key in self.plan.alone:
                solve(key)
            return None, None

        agree(solve_own, self.group)
        # Collective, and so in one order on all ranks; after those that each does by itself.
        for key in [*self.plan.common, *self.plan.row_wise]:
            solve(key)
        shown.close()
        return done

    def commit(self, done: Done) -> None:
        """Writes codes that were not kept as they are found again, then all the rest.

        Raises:
            RuntimeError: on every rank, if a write failed on any.
        """
        # Goes on after a failure, so that as few chunks as possible are half of a step.
        failures: list[str] = []
        for key in [*self.plan.alone, *self.plan.common, *self.plan.row_wise]:
            try:
                with span(f"{self.plan.tasks[key].span}, write"):
                    self._write(key, done)
            except Exception as error:
                failures.append(f"{self.plan.tasks[key].name}: {reason(error)}")
        everyone = [failure for found in gather(failures, self.group) for failure in found]
        if everyone:
            raise RuntimeError(
                f"clustering failed while it was writing ({'; '.join(dict.fromkeys(everyone))}); "
                "some chunks are new, others old: restore the last checkpoint"
            )

    def _write(self, key: ChunkKey, done: Done) -> None:
        if key in self.mine:
            update, _ = done[key]
            if key not in self.kept:
                self._solver(key).write_codes(update)
            self.mine[key].commit(update)
        elif key not in self.kept:
            self._helper(key).write_codes()


@contextmanager
def wider_codes(
    states: list[tuple[str, ChunkState]], group: dist.ProcessGroup | None
) -> Iterator[None]:
    """Codes of the bits that they will have after the step; of their own again if it fails."""
    before: list[tuple[ChunkCodes, CodePacking]] = []

    def widen() -> tuple[None, None]:
        for _, state in states:
            own = state.codes
            if own.packing != state.new_packing:
                before.append((own, own.packing))
                own.repack(state.new_packing)
        return None, None

    try:
        agree(widen, group)
        yield
    # An interruption too, which leaves the model as it was.
    except BaseException:
        for codes, packing in before:
            codes.repack(packing)
        raise
