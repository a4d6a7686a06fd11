"""Checkpoints that a thread writes while training goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from weakref import WeakKeyDictionary

import torch.distributed as dist

from cce_torchrec.collectives import Ranks
from cce_torchrec.torchrec_internals import before_threads_end

logger = logging.getLogger(__name__)

_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save_checkpoint")
before_threads_end(_THREAD.shutdown)  # which waits for what is being written
_cpu_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
_unfinished: list[PendingCheckpoint] = []
"""The last one, until a save or a load has waited for it."""


class PendingCheckpoint:
    """A checkpoint that is being written; the same on every rank."""

    def __init__(self, write: Callable[[Ranks], Path], ranks: Ranks) -> None:
        # A group of its own: the training goes on to use the other, and messages would be mixed up.
        group = None if ranks.group is None else _cpu_group(ranks.group)
        began = time.perf_counter()
        self.written: tuple[Path, float] | None = None
        """Its folder and the seconds since the call, once it is in place."""

        def work() -> Path:
            path = write(Ranks(group))
            self.written = path, time.perf_counter() - began
            return path

        self._future: Future[Path] = _THREAD.submit(work)
        self._future.add_done_callback(_log_failure)
        self._waited = False
        _unfinished[:] = [self]

    def done(self) -> bool:
        """Whether it is written, or has failed; it never waits."""
        return self._future.done()

    def result(self) -> Path:
        """Waits until the checkpoint is in place on every rank, and returns its folder.

        Raises:
            ValueError: on every rank, if anything failed on any; the folder's latest checkpoint is
                then what it was.
        """
        self._waited = True
        return self._future.result()

    def finish(self) -> None:
        """Waits, and raises what failed unless `result` has done so."""
        if not self._waited:
            self.result()


def finish_pending() -> None:
    """Waits for the checkpoint that is being written, if there is one.

    Raises:
        ValueError: it failed, and nobody has asked for its result.
    """
    while _unfinished:
        _unfinished.pop().finish()


def _log_failure(future: Future[Path]) -> None:
    # At once, as the next save may be hours away.
    if future.exception() is not None:
        logger.error("a checkpoint was not written: %s", future.exception())


def _cpu_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The gloo group of the same ranks, which the first call makes; collective then."""
    if group not in _cpu_groups:
        ranks = dist.get_process_group_ranks(group)
        # The other ranks of the job, which may be elsewhere, need not take part. Never destroyed: a
        # second group of the same ranks would have the name and so the addresses of the first.
        _cpu_groups[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _cpu_groups[group]
