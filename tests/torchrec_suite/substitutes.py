"""What TorchRec's tests get for TorchRec's classes: CCE collections of identity configurations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import torchrec.modules.embedding_modules as torchrec_modules
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    EmbeddingBagConfig,
    EmbeddingConfig,
)

from cce_torchrec.codes import chunk_codes
from cce_torchrec.codes.storage import in_whole_words
from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.distributed.embedding_bag_sharder import CCEEmbeddingBagCollectionSharder
from cce_torchrec.distributed.embedding_collection import (
    CCEEmbeddingCollectionSharder,
    ShardedCCEEmbeddingCollection,
)
from cce_torchrec.distributed.feature_processed import FeatureProcessedSharder
from cce_torchrec.distributed.sharders import get_default_sharders, register_sharders
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.modules.embedding_collection import CCEEmbeddingCollection
from cce_torchrec.table import physical_table

__all__ = [
    "EmbeddingBagCollection",
    "EmbeddingBagCollectionSharder",
    "EmbeddingCollection",
    "EmbeddingCollectionSharder",
    "FeatureProcessedEmbeddingBagCollectionSharder",
    "ShardedEmbeddingBagCollection",
    "ShardedEmbeddingCollection",
    "copy_state_dict",
    "get_default_sharders",
]

CHUNK_DIM = 4
"""Width of a chunk, so that every cut by columns which FBGEMM can read is between two."""


def identity_codes(
    config: CCEEmbeddingBagConfig,
    chunks: Sequence[int],
    device: torch.device,
    ids: range | None = None,
) -> torch.Tensor:
    """Codes that are the ids, in the place of `hashed_codes`."""
    ids = range(config.num_embeddings) if ids is None else ids
    rows = torch.arange(ids.start, ids.stop).unsqueeze(1).expand(-1, len(chunks))
    return in_whole_words(config.packing.pack(rows)).to(device)


chunk_codes.hashed_codes = identity_codes
register_sharders()  # for tests that leave the sharders to TorchRec


def identity(config: BaseEmbeddingConfig) -> BaseEmbeddingConfig:
    """The CCE table that equals `config`; `config` itself where there is none of its shape."""
    if isinstance(config, CCEEmbeddingBagConfig) or config.embedding_dim % CHUNK_DIM:
        return config
    names = {field.name for field in fields(EmbeddingBagConfig)}
    kept = {f.name: getattr(config, f.name) for f in fields(config) if f.name in names}
    # TorchRec fills in a default, which would be taken for one of the user's.
    if isinstance(config.init_fn, partial) and config.init_fn.func is torch.nn.init.uniform_:
        kept["init_fn"] = None
    return CCEEmbeddingBagConfig(
        num_rows=config.num_embeddings,
        num_helper_rows=0,
        num_chunks=config.embedding_dim // CHUNK_DIM,
        **kept,
    )


def with_weights_of(plain: Any, tables: Sequence[BaseEmbeddingConfig], made: Any) -> Any:
    """The CCE collection `made` with the weights of a plain one, drawn as TorchRec does.

    Args:
        plain: TorchRec's collection of the same tables.
        tables: their identity configurations.
        made: a CCE collection of these.
    """
    given = plain.embedding_bags if hasattr(plain, "embedding_bags") else plain.embeddings
    own = made.embedding_bags if hasattr(made, "embedding_bags") else made.embeddings
    for table in tables:
        if given[table.name].weight.is_meta:
            continue
        chunks = range(table.num_chunks) if is_cce(table) else ()
        names = [physical_table(table.name, chunk) for chunk in chunks] or [table.name]
        with torch.no_grad():
            parts = given[table.name].weight.chunk(len(names), dim=1)
            for name, part in zip(names, parts, strict=True):
                own[name].weight.copy_(part)
    made.register_load_state_dict_pre_hook(take_whole_weights)
    return made


class _StandsFor(type):
    """Makes collections of the exact class that sharders look for."""

    made: type

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.made)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.made)


class EmbeddingBagCollection(metaclass=_StandsFor):
    """Called as TorchRec's, makes a CCEEmbeddingBagCollection of identity configurations."""

    made = CCEEmbeddingBagCollection

    def __new__(
        cls,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
    ) -> Any:
        """The collection."""
        plain = torchrec_modules.EmbeddingBagCollection(tables, is_weighted, device)
        configs = [identity(table) for table in tables]
        with torch.random.fork_rng(devices=[]):
            return with_weights_of(plain, configs, cls.made(configs, device, is_weighted))


class EmbeddingCollection(metaclass=_StandsFor):
    """Called as TorchRec's, makes a CCEEmbeddingCollection of identity configurations."""

    made = CCEEmbeddingCollection

    def __new__(
        cls,
        tables: list[EmbeddingConfig],
        device: torch.device | None = None,
        need_indices: bool = False,
    ) -> Any:
        """The collection."""
        plain = torchrec_modules.EmbeddingCollection(tables, device, need_indices)
        configs = [identity(table) for table in tables]
        with torch.random.fork_rng(devices=[]):
            return with_weights_of(plain, configs, cls.made(configs, device, need_indices))


EmbeddingBagCollectionSharder = CCEEmbeddingBagCollectionSharder
EmbeddingCollectionSharder = CCEEmbeddingCollectionSharder
FeatureProcessedEmbeddingBagCollectionSharder = FeatureProcessedSharder
ShardedEmbeddingBagCollection = ShardedCCEEmbeddingBagCollection
ShardedEmbeddingCollection = ShardedCCEEmbeddingCollection


def _whole_weights(names: Iterable[str], state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of `names` of chunks' weights, those of which `state` has the whole table, with their part.

    Tests set tables to values that they write down, by the name that TorchRec has for them.
    """
    out = {}
    for name in names:
        path, _, chunk = name.removesuffix(".weight").partition("#")
        table = path.rpartition(".")[2]
        whole = [key for key in state if re.search(rf"embedding(_bag)?s\.{table}\.weight$", key)]
        if chunk and whole:
            first = int(chunk) * CHUNK_DIM
            out[name] = state[whole[0]][:, first : first + CHUNK_DIM]
    return out


def take_whole_weights(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a load into the unsharded `module`: weights of its chunks, and codes as they are."""
    own = {f"{prefix}{name}": value for name, value in module.named_parameters()}
    found = _whole_weights(own, state)
    if found:
        for key in [key for key in state if key.startswith(prefix) and "#" not in key]:
            if re.search(r"embedding(_bag)?s\.\w+\.weight$", key):
                del state[key]
        state |= found | {f"{prefix}{name}": value for name, value in module.named_buffers()}


def copy_state_dict(
    loc: dict[str, Any], glob: dict[str, torch.Tensor], exclude_predfix: Any = None
) -> None:
    """TorchRec's, with weights of chunks from those of whole tables, whose codes are left alone."""
    from torchrec.distributed.test_utils import test_sharding

    found = _whole_weights(loc, glob)
    kept = {k: v for k, v in loc.items() if not (found and k not in glob and ".codes." in f".{k}")}
    test_sharding.copy_state_dict(kept, glob | found, exclude_predfix)
