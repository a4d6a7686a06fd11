"""Named ranges of a profile, in TorchRec's form, and at no cost where nobody profiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.profiler import record_function

from cce_torchrec.torchrec_internals import profiler_enabled

_NOTHING: AbstractContextManager[object] = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """A range `## cce NAME ##` of the profile that is being recorded; otherwise nothing.

    Args:
        name: what is done in it: `expand`, `cluster: user, chunk 0, k-means`.
    """
    # torch's range takes microseconds also where nobody records it, and breaks a compiled graph.
    if torch.compiler.is_compiling() or not profiler_enabled():
        return _NOTHING
    return record_function(f"## cce {name} ##")
