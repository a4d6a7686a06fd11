"""What of a model `compress_model` can compress, and why it leaves the rest alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    EmbeddingConfig,
    data_type_to_dtype,
    dtype_to_data_type,
)
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
)
from torchrec.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection
from torchrec.modules.itep_embedding_modules import (
    ITEPEmbeddingBagCollection,
    ITEPEmbeddingCollection,
)
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection

from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.modules.embedding_collection import CCEEmbeddingCollection

_COMPRESSIBLE = (
    EmbeddingBagCollection,
    EmbeddingCollection,
    CCEEmbeddingBagCollection,
    CCEEmbeddingCollection,
)
_HOLDERS: list[tuple[tuple[type[nn.Module], ...], str]] = [
    (
        (BaseManagedCollisionEmbeddingCollection,),
        "managed collision rewrites rows of evicted ids, and a codebook row belongs to many ids",
    ),
    (
        (ITEPEmbeddingBagCollection, ITEPEmbeddingCollection),
        "in-training pruning takes rows from ids, and a codebook row belongs to many ids",
    ),
    (
        (EmbeddingTower, EmbeddingTowerCollection),
        "TorchRec shards an embedding tower with collections of its own alone",
    ),
]


@dataclass(frozen=True)
class Found:
    """A module of a model that has embedding tables."""

    path: str
    module: nn.Module
    configs: Sequence[BaseEmbeddingConfig]
    reason: str
    """Why all of its tables stay; empty where they can be compressed."""


def collections_of(model: nn.Module) -> list[Found]:
    """The modules of `model` with tables, those of torch that are in no collection included."""
    found: list[Found] = []
    inside: set[nn.Module] = set()
    held: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        for types, reason in _HOLDERS:
            if isinstance(module, types):
                held |= dict.fromkeys(module.modules(), reason)
        if module in inside:
            continue
        configs: Sequence[BaseEmbeddingConfig] = []
        if isinstance(module, EmbeddingBagCollectionInterface):
            configs = module.embedding_bag_configs()
        elif isinstance(module, EmbeddingCollectionInterface):
            configs = module.embedding_configs()
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            path, _, name = path.rpartition(".")
            configs = [_of_weight(name, module.weight)]
        if configs:
            found.append(Found(path, module, configs, held.get(module) or _reason(module)))
            inside.update(module.modules())
    return found


def _of_weight(name: str, weight: torch.Tensor) -> EmbeddingConfig:
    """A table called `name` of the shape and type of `weight`."""
    rows, dim = weight.shape
    data_type = dtype_to_data_type(weight.dtype)
    return EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=dim, data_type=data_type)


def _reason(module: nn.Module) -> str:
    """Why the tables of `module` stay, by its class; empty if they need not."""
    kind = type(module)
    # Of exactly these classes: a subclass may do more, which its replacement would not.
    if kind in _COMPRESSIBLE:
        return ""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return f"an nn.{kind.__name__} of its own, in no collection of TorchRec"
    return (
        f"{kind.__name__} may do more than the collections of TorchRec that are replaced; build a "
        "CCE collection in its place"
    )


def full_bytes(config: BaseEmbeddingConfig) -> int:
    """Bytes of the weights of a plain table."""
    itemsize = data_type_to_dtype(config.data_type).itemsize
    return config.num_embeddings * config.embedding_dim * itemsize


def weights_of(module: nn.Module) -> nn.ModuleDict:
    """The modules that hold the weights of a collection, by table, or by chunk ("user#0")."""
    if isinstance(module, CCEEmbeddingBagCollection | EmbeddingBagCollection):
        return module.embedding_bags
    assert isinstance(module, CCEEmbeddingCollection | EmbeddingCollection)
    return module.embeddings


def remade(module: nn.Module, tables: Sequence[BaseEmbeddingConfig]) -> nn.Module:
    """A CCE collection of `tables`, with what the collection `module` has of the same tables."""
    made = _like(module, tables)
    old, new = weights_of(module), weights_of(made)
    with torch.no_grad():
        # A table that is compressed now has one name before and others, its chunks', after.
        for name in old.keys() & new.keys():
            given, own = old[name].get_parameter("weight"), new[name].get_parameter("weight")
            own.requires_grad_(given.requires_grad)
            if not given.is_meta:
                own.copy_(given)
    codes = _bags(module).codes if isinstance(module, _COMPRESSIBLE[2:]) else nn.ModuleDict()
    for name, own_codes in codes.items():
        if not any(buffer.is_meta for buffer in own_codes.buffers()):
            _bags(made).codes[name].load_state_dict(own_codes.state_dict())
    return made.train(module.training)


def _like(module: nn.Module, tables: Sequence[BaseEmbeddingConfig]) -> nn.Module:
    """A new CCE collection of `tables` with the options of the collection `module`."""
    modes: dict[str, Any] = {}
    if isinstance(module, _COMPRESSIBLE[2:]):
        modes["bounds_check_mode"] = _bags(module).bounds_check_mode
    # A joint table brings features together that were apart.
    modes["output_order"] = _keys(module)
    if isinstance(module, CCEEmbeddingBagCollection | EmbeddingBagCollection):
        return CCEEmbeddingBagCollection(tables, module.device, module.is_weighted(), **modes)
    assert isinstance(module, CCEEmbeddingCollection | EmbeddingCollection)
    return CCEEmbeddingCollection(tables, module.device, module.need_indices(), **modes)


def _keys(module: nn.Module) -> list[str]:
    """Names of what a collection returns, in their order."""
    # Of a collection that was compressed before, which may have an order of its own.
    if isinstance(module, _COMPRESSIBLE[2:]):
        return _bags(module).output.keys
    if isinstance(module, EmbeddingBagCollection):
        by_table = get_embedding_names_by_table(module.embedding_bag_configs())
    else:
        assert isinstance(module, EmbeddingCollection)
        by_table = module.embedding_names_by_table()
    return list(itertools.chain.from_iterable(by_table))


def _bags(module: nn.Module) -> CCEEmbeddingBagCollection:
    """The bag form behind a CCE collection."""
    bags = module.bags if isinstance(module, CCEEmbeddingCollection) else module
    assert isinstance(bags, CCEEmbeddingBagCollection)
    return bags
