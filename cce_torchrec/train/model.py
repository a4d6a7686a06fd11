"""The models: TorchRec's DLRM, and GMF (sigmoid of a dot product)."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.config_checks import table_names
from cce_torchrec.data import Examples, Rows
from cce_torchrec.joint import free_name, joint_table
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.recipe import is_rare, recipe_fields
from cce_torchrec.sizing import default_chunks
from cce_torchrec.train.options import bytes_per_table


class GMF(nn.Module):
    """Logits [B]: the dot product of the embeddings of two features (He et al., WWW 2017)."""

    def __init__(self, embedding_bag_collection: CCEEmbeddingBagCollection) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding_bag_collection
        self._dim = embedding_bag_collection.embedding_bag_configs()[0].embedding_dim

    def forward(self, dense: torch.Tensor, ids: KeyedJaggedTensor) -> torch.Tensor:
        """Logits [B]; `dense` is not read."""
        pooled = self.embedding_bag_collection(ids).values()
        return (pooled[:, : self._dim] * pooled[:, self._dim :]).sum(1)


class DLRMLogits(nn.Module):
    """Logits [B] of TorchRec's DLRM."""

    def __init__(
        self, embedding_bag_collection: CCEEmbeddingBagCollection, dense_features: int, dim: int
    ) -> None:
        super().__init__()
        self.dlrm = DLRM(
            embedding_bag_collection=embedding_bag_collection,
            dense_in_features=dense_features,
            dense_arch_layer_sizes=[64, dim],
            over_arch_layer_sizes=[128, 64, 1],
        )

    def forward(self, dense: torch.Tensor, ids: KeyedJaggedTensor) -> torch.Tensor:
        """Logits [B]."""
        return self.dlrm(dense, ids).squeeze(1)


def chunks_by_default(args: argparse.Namespace) -> int | None:
    """Chunks of the compressed tables of a run that names no number of them.

    None: within bytes CCE tables have as many as suit each.
    """
    if args.method == "cce" and args.table_bytes is not None:
        return None
    fields = {"embedding_dim": args.embedding_dim, "learned_codes": args.method != "ce"}
    return default_chunks(fields, count_codes=args.params_per_dim is None)


def chunks_in_common(configs: Iterable[EmbeddingBagConfig]) -> int | None:
    """The chunks of all compressed tables, which a resumed run must have too; None: of several."""
    found = {config.num_chunks for config in configs if is_cce(config)}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How the compressed features of a run are compressed."""

    method: str
    """cce, ce (hashed codes, no helper), hash (one chunk of that) or full."""
    num_chunks: int | None
    """None: by the budget and the recipe of each table."""
    rows: dict[str, int]
    """Per compressed feature, main + helper rows."""
    num_rows: int | None
    """Of main, of each compressed feature, with three times as many helper rows, instead."""
    table_bytes: dict[str, int]
    """Per compressed feature, what a CCE table may take instead, or empty."""
    finalize: bool
    """Whether tables are finalized, so that codes will tell main and helper rows apart."""
    recipe: str
    """Of CCE tables."""
    joint: str
    """Features that share one table, of the rows or bytes of all of them: "no", those of "rare"
    ids, or "all"."""
    multiplies: bool
    """Whether the network multiplies the embeddings of two features (GMF)."""
    seed: int

    @classmethod
    def asked_for(
        cls, args: argparse.Namespace, dataset: Examples, rows: dict[str, int]
    ) -> Compression:
        """What the options of a run say, whose tables have `rows`."""
        # A budget in bytes is that of each table; of other budgets rows say all.
        by_bytes = {} if args.table_bytes is None else bytes_per_table(args, dataset)
        return cls(
            method=args.method,
            num_chunks=args.num_chunks,
            rows=rows,
            num_rows=args.num_rows,
            table_bytes=by_bytes,
            finalize=args.finalize,
            recipe=args.recipe,
            joint=args.joint,
            multiplies=args.model == "gmf",
            seed=args.seed,
        )

    def joins(self, examples_per_id: float) -> bool:
        """Whether a feature is one of those that share a table."""
        if self.joint != "rare":
            return self.joint == "all"
        if self.recipe == "auto":
            return is_rare(examples_per_id, multiplies=self.multiplies)
        return self.recipe == "rare"

    def table(
        self, names: Sequence[str], examples_per_id: float, common: dict[str, Any]
    ) -> CCEEmbeddingBagConfig:
        """The compressed table of the features `names`, whose other fields are `common`."""
        rows = sum(self.rows[name] for name in names)
        chunks = 1 if self.method == "hash" else self.num_chunks
        common |= {"seed": self.seed} | ({} if chunks is None else {"num_chunks": chunks})
        if self.method != "cce":
            common |= {"num_helper_rows": 0, "learned_codes": False}
            return CCEEmbeddingBagConfig(num_rows=rows, **common)
        if self.recipe == "auto":
            common |= recipe_fields(examples_per_id, multiplies=self.multiplies)
        else:
            common |= {"recipe": self.recipe, "examples_per_id": examples_per_id}
        # Asked for as they are, where other budgets leave the rows to the recipe.
        if self.num_rows is not None:
            return CCEEmbeddingBagConfig(num_rows=self.num_rows * len(names), **common)
        if self.table_bytes:
            share = sum(self.table_bytes[name] for name in names)
            return CCEEmbeddingBagConfig.from_bytes(share, finalized=self.finalize, **common)
        return CCEEmbeddingBagConfig.from_params_per_dim(rows, **common)


def tables(
    dataset: Examples, compression: Compression, *, dim: int, init_bound: float | None
) -> list[EmbeddingBagConfig]:
    """The tables of all features: a full one for each, or compressed ones, which some may share.

    Args:
        dataset: with its features and their ids.
        compression: of those that it says are to be compressed.
        dim: of embeddings.
        init_bound: embeddings start uniform in +-init_bound; None is TorchRec's
            1 / sqrt(num_embeddings).
    """
    full, out = {}, []
    names = table_names(dataset.features)
    for name, size in dataset.features.items():
        full[name] = {
            "name": names[name],
            "num_embeddings": size,
            "embedding_dim": dim,
            "feature_names": [name],
            "weight_init_min": None if init_bound is None else -init_bound,
            "weight_init_max": init_bound,
        }
    compressed = [] if compression.method == "full" else dataset.compressed
    # In one pass, which is what the recipe goes by.
    examples = {name: dataset.num_train / dataset.features[name] for name in compressed}
    joint = [name for name in compressed if compression.joins(examples[name])]
    for name, common in full.items():
        if name not in compressed:
            out.append(EmbeddingBagConfig(**common))
        elif name not in joint or len(joint) == 1:
            out.append(compression.table([name], examples[name], common))
        # The others of them are in the table of the first.
        elif name == joint[0]:
            members = [EmbeddingBagConfig(**full[other]) for other in joint]
            fields = joint_table(members, free_name(names.values()))
            mean = len(joint) * dataset.num_train / fields["num_embeddings"]
            out.append(compression.table(joint, mean, fields))
    return out


def refuse_to_finalize_none(configs: Sequence[EmbeddingBagConfig]) -> None:
    """Raises ValueError if --finalize would leave every table alone."""
    if not any(is_cce(config) and config.can_finalize for config in configs):
        raise ValueError(
            "--finalize: all compressed tables are of rare ids, which keep their helper rows; "
            "leave it out, or give --recipe frequent"
        )


def keyed_jagged(rows: Rows, features: list[str]) -> KeyedJaggedTensor:
    """One id per row of the features of `rows.ids`, then the bags of those that have several."""
    ones = torch.ones(rows.ids.numel(), dtype=torch.int32, device=rows.ids.device)
    per_key = [len(rows)] * rows.ids.shape[1] + [len(bag.values) for bag in rows.bags]
    return KeyedJaggedTensor(
        keys=features,
        values=torch.cat([rows.ids.t().reshape(-1), *(bag.values for bag in rows.bags)]),
        lengths=torch.cat([ones, *(bag.lengths.int() for bag in rows.bags)]),
        stride=len(rows),
        length_per_key=per_key,  # a step on a GPU would wait to count them
    )
