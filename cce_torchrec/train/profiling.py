"""`--profile`: a trace of a few steps of each rank, for chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from cce_torchrec.checkpoint.location import make_folder, store_of

_SKIPPED = 10
"""First steps of a run that are not recorded, if there are enough: they make what others use."""


class Trace:
    """Records `steps` steps of this rank, and writes them to profile/rank-R.json of `out`.

    Args:
        out: folder of the run, a local one.
        steps: to record; 0 records nothing.
        left: steps that the run still has.
    """

    def __init__(self, out: Path, steps: int, left: int) -> None:
        self._profiler: profile | None = None
        steps = min(steps, left - 1)  # the step before them sets the profiler up
        if steps < 1:
            return
        folder = out / "profile"
        make_folder(folder)
        file = folder / f"rank-{dist.get_rank()}.json"
        # What the device does comes too, if it is a GPU.
        self._profiler = profile(
            activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA],
            schedule=schedule(
                skip_first=min(_SKIPPED, left - 1 - steps),
                wait=0,
                warmup=1,
                active=steps,
                repeat=1,
            ),
            on_trace_ready=lambda recorded: recorded.export_chrome_trace(str(file)),
        )
        self._profiler.start()

    def step(self) -> None:
        """A step has ended, with all that came after it: a clustering, a checkpoint."""
        if self._profiler is not None:
            self._profiler.step()

    def end(self) -> None:
        """Stops recording."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def check_profile(out: Path) -> None:
    """Refuses an `out` that is no local folder.

    Raises:
        ValueError: it is in an object store.
    """
    if store_of(out) is not None:
        raise ValueError(
            f"--profile writes local files, which {out} does not take; leave it out, or give --out "
            "a local folder"
        )
