"""Where the sharders of CCE collections are, in the errors of jobs that do not give them."""

from __future__ import annotations

import abc

HOW_TO_SHARD = (
    "call cce_torchrec.register_sharders() before, or give "
    "sharders=cce_torchrec.get_default_sharders()"
)
"""What a job has to do before TorchRec can shard a CCE collection."""


class NamesItsSharder(abc.ABCMeta):
    """The class of CCE collections, whose printed form says how they are sharded.

    A plan for a collection that no sharder is given for ends in a KeyError of its class, and
    `torchrec.distributed.shard` in an assertion that prints it: TorchRec says nothing else there.
    """

    # By the class of the class, as a KeyError prints its key, and nothing else of ours is asked.
    def __repr__(cls) -> str:
        return f"{super().__repr__()} (to shard it, {HOW_TO_SHARD})"
