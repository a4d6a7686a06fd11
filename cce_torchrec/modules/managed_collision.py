"""Managed collision around CCE tables is refused.

TorchRec asks nothing of a sequence collection that it wraps that could be answered by an error, so
the refusal is a hook on module registration. The hook is torch's, and global; it looks at the
types of parent and child alone.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection

from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.modules.embedding_collection import CCEEmbeddingCollection


def refuse(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Called by torch when `child` becomes a submodule of `parent`.

    Raises:
        ValueError: a CCE collection inside a managed-collision module.
    """
    if not isinstance(parent, BaseManagedCollisionEmbeddingCollection):
        return
    if isinstance(child, CCEEmbeddingCollection):
        child = child.bags
    if isinstance(child, CCEEmbeddingBagCollection):
        raise ValueError(
            f"tables {[config.name for config in child.embedding_bag_configs()]}: managed "
            "collision rewrites the rows of evicted ids, and the codebook rows of a CCE table "
            "belong to many ids; hash raw ids with CCEEmbeddingBagConfig(hash_ids=True) instead"
        )


register_module_module_registration_hook(refuse)
