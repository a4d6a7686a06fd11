"""A trained collection as TorchRec's own, with a row for every id."""

from __future__ import annotations

from dataclasses import fields

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from cce_torchrec.inference.collection import inference_collection
from cce_torchrec.inference.vectors import blocks_of
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.table import Table


def plain_collection(collection: CCEEmbeddingBagCollection) -> EmbeddingBagCollection:
    """An `EmbeddingBagCollection` that gives what `collection` does, to rounding.

    Tables keep their names, features and pooling, and come in the order of their configuration. A
    joint table becomes one for each range of ids, called by it and the first feature of the range.
    The result takes as many bytes as full tables do (`CCEEmbeddingBagConfig.full_bytes`).

    Raises:
        ValueError: a table of raw ids, which have no rows of their own, or the mean of weighted
            bags, which TorchRec's collection does not have.
    """
    if collection.is_weighted() and any(
        config.pooling != PoolingType.SUM for config in collection.embedding_bag_configs()
    ):
        raise ValueError("TorchRec's EmbeddingBagCollection has no mean of weighted bags")
    served = inference_collection(collection, data_type="fp32")
    configs: list[EmbeddingBagConfig] = []
    keys: list[str] = []
    """Of each table, a feature whose ids are all of its own."""
    for table in collection.tables:
        for config, feature in _plain(table):
            configs.append(config)
            keys.append(_key(collection, table.name, feature))
    # Tables of one feature or of several alike: rows are those of ids, whoever reads them.
    out = EmbeddingBagCollection(tables=configs, is_weighted=collection.is_weighted())
    with torch.no_grad():
        for config, key in zip(configs, keys, strict=True):
            weight, first = out.embedding_bags[config.name].weight, 0
            for _, vectors in blocks_of(served, key):
                weight[first : first + len(vectors)] = vectors
                first += len(vectors)
    return out


def _plain(table: Table) -> list[tuple[EmbeddingBagConfig, str]]:
    """The plain tables in place of one, each with one of its features."""
    config, cce = table.config, table.cce
    own = {field.name: getattr(config, field.name) for field in fields(EmbeddingBagConfig)}
    own |= {"init_fn": None}  # that of codebooks is not for rows
    if cce is None or not cce.id_ranges:
        if cce is not None and cce.hash_ids:
            raise ValueError(
                f"table {table.name!r} has raw ids, any of 2^64, and no row for each; look those "
                "up that there are by vectors_of"
            )
        return [(EmbeddingBagConfig(**own), config.feature_names[0])]
    if cce.hash_ids:
        raise ValueError(f"table {table.name!r} has raw ids, any of 2^64, and no row for each")
    # Features that share a range share its rows.
    by_range: dict[range, list[str]] = {}
    for feature in config.feature_names:
        by_range.setdefault(cce.id_ranges[feature], []).append(feature)
    return [
        (
            EmbeddingBagConfig(
                **own
                | {
                    "name": f"{table.name}_{names[0]}",
                    "num_embeddings": len(ids),
                    "feature_names": names,
                }
            ),
            names[0],
        )
        for ids, names in by_range.items()
    ]


def _key(collection: CCEEmbeddingBagCollection, table: str, feature: str) -> str:
    """The name of a feature of a table in the output."""
    slots = collection.output.slots
    number = next(i for i, s in enumerate(slots) if (s.table, s.feature) == (table, feature))
    return collection.output.names[number]
