"""What torch's and TorchRec's quantisation would pass over in CCE collections without a word.

`quantize_embeddings` goes by the class of modules and the name of tables. It calls nothing of a
collection; all that it does is to set `qconfig` on each module, and then to ask for its children.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from cce_torchrec.table import Table

logger = logging.getLogger(__name__)


class PassedOver:
    """A sharded collection, which quantisation leaves as it is: says so when it is tried."""

    tables: list[Table]

    @property
    def qconfig(self) -> None:
        """No configuration of quantisation, whatever was set."""
        return None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        """Says that it changes nothing."""
        logger.warning(
            "tables %s are sharded, and quantisation leaves them as they are: save a checkpoint, "
            "load it into the unsharded model and quantise that",
            [table.name for table in self.tables],
        )

    @qconfig.deleter
    def qconfig(self) -> None:
        """Nothing to do: torch deletes what it has set."""


class ChecksNames(nn.Module):
    """An unsharded collection, whose chunks are quantised as tables of their own names."""

    tables: list[Table]

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules inside.

        Raises:
            ValueError: `per_table_weight_dtype` names a table whose chunks have other names.
        """
        children = dict(super().named_children())
        inner = children.get("embedding_bag_collection")
        given = getattr(getattr(inner, "qconfig", None), "per_table_weight_dtype", None) or {}
        for table in self.tables if given else ():
            if table.cce is not None and table.name in given:
                del inner.qconfig  # type: ignore[union-attr]  # or every later call would fail too
                chunks = [f"{table.name}#{chunk}" for chunk in table.chunks]
                raise ValueError(
                    f"per_table_weight_dtype names table {table.name!r}, whose chunks are tables "
                    f"of their own there; name these: {chunks}"
                )
        return iter(children.items())
