"""The CCE collections of a model, by the names that their tables have in it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.utils import append_prefix

from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.distributed.embedding_collection import ShardedCCEEmbeddingCollection
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.modules.embedding_collection import CCEEmbeddingCollection

Collection = CCEEmbeddingBagCollection | ShardedCCEEmbeddingBagCollection
"""Where tables are, which those of sequences have inside."""


def cce_collections(model: nn.Module) -> Iterator[tuple[str, Collection]]:
    """The collections of `model` in its order, each once, with their paths.

    Paths are those of the user's own modules, as in state dicts and checkpoints: without what
    DistributedModelParallel, DistributedDataParallel and a collection of sequences put around them.
    """
    yield from _below(model, "", set())


def _below(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, Collection]]:
    module = get_unwrapped_module(module)
    if isinstance(module, CCEEmbeddingCollection | ShardedCCEEmbeddingCollection):
        module = module.bags
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, CCEEmbeddingBagCollection | ShardedCCEEmbeddingBagCollection):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _below(child, append_prefix(path, name), seen)
