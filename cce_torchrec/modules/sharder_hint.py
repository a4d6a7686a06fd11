"""Where the sharders of CCE collections are, in the errors of jobs that do not give them."""

from __future__ import annotations

import abc
from typing import Any

from torch import nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface

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

    @property
    def way_to_shard(cls) -> str:
        """What to do for TorchRec to shard a collection of this class."""
        # Sharders are found by the exact class of a module.
        if cls.__module__.startswith("cce_torchrec."):
            return HOW_TO_SHARD
        ours = next(base for base in cls.__mro__ if base.__module__.startswith("cce_torchrec."))
        return (
            f"sharders take {ours.__name__} itself and no subclass of it; have one inside "
            "a module of your own"
        )

    # By the class of the class, as a KeyError prints its key, and nothing else of ours is asked.
    def __repr__(cls) -> str:
        return f"{super().__repr__()} (to shard it: {cls.way_to_shard})"


class ShardedWhole(nn.Module, metaclass=NamesItsSharder):
    """A collection that is sharded with its codes, or not at all."""

    def __setattr__(self, name: str, value: object) -> None:
        self._refuse_sharded_inside(value)
        super().__setattr__(name, value)  # type: ignore[arg-type]  # torch types modules alone

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As torch has it; refuses a sharded module in the place of one inside.

        Raises:
            ValueError: saying what to give TorchRec.
        """
        self._refuse_sharded_inside(module)
        super().add_module(name, module)

    def _refuse_sharded_inside(self, value: object) -> None:
        # TorchRec without our sharders looks inside, and finds a module of its own: in
        # DistributedModelParallel, which sets attributes, and in shard_modules, which adds modules.
        if isinstance(value, ShardedModule):
            own: Any = self
            pooled = isinstance(self, EmbeddingBagCollectionInterface)
            configs = own.embedding_bag_configs() if pooled else own.embedding_configs()
            raise ValueError(
                f"tables {[config.name for config in configs]}: the chunks inside a "
                f"{type(self).__name__} were about to be sharded without their codes; "
                f"{type(self).way_to_shard}"
            )
