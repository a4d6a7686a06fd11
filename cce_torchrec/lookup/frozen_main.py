"""Main rows that no optimizer trains: those of tables of the recipe "rare".

An optimizer steps all rows of a physical table, and fused ones in one kernel with the backward
pass. What any of them makes of main rows is overwritten before they are read next, so that it holds
for every optimizer, exactly. There are few such rows, as codes of rare ids have few bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cce_torchrec.torchrec_internals import copy_all


# Functions, as torch marks the hooks that it is given, which methods do not allow.
def _restore_main(module: Any, *_: Any) -> None:
    """Before a collection's state dict is made."""
    module.restore_main()


def _forget_main(module: Any, _: Any) -> None:
    """After one was loaded."""
    module.frozen_main.forget()


class FrozenMain:
    """Keeps the main rows of a collection's tables as they are.

    The collection has this as `frozen_main`, and a method `restore_main` that calls `restore`. It
    is not referred to from here, or its memory would wait for the collector of cycles.

    Args:
        collection: whose state dicts have these rows.
    """

    def __init__(self, collection: nn.Module) -> None:
        collection.register_state_dict_pre_hook(_restore_main)
        collection.register_load_state_dict_post_hook(_forget_main)
        self._kept: list[torch.Tensor] = []

    def restore(self, rows: list[torch.Tensor]) -> None:
        """Puts the rows back; to be called before they are read.

        Args:
            rows: live views [k, s] of those that are not trained, in the same order each time.
        """
        if rows:
            self._put_back(rows)

    @torch.compiler.disable  # a graph would have the rows of when it was made
    def _put_back(self, rows: list[torch.Tensor]) -> None:
        with torch.no_grad():
            # At the first lookup, so that whoever has built the model may have filled it.
            if not self._kept:
                self._kept = [view.detach().clone() for view in rows]
            else:
                copy_all(rows, self._kept)

    def forget(self) -> None:
        """The rows as they are now are those to be kept: they were clustered, or loaded."""
        self._kept = []
