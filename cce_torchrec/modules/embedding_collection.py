"""CCEEmbeddingCollection: TorchRec's EmbeddingCollection with compressed tables in it.

An id is a bag of its own in a `CCEEmbeddingBagCollection`, so that pooling adds the main and the
helper row and nothing else: configuration, codes, lookup and clustering are those of the bag form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.lookup.bags import bags_of_one
from cce_torchrec.lookup.output import LogicalOutput
from cce_torchrec.modules import traced
from cce_torchrec.modules.embedding_bag_collection import (
    CCEEmbeddingBagCollection,
    select_slots,
    with_features,
)
from cce_torchrec.modules.old_names import take_old_names
from cce_torchrec.modules.sharder_hint import ShardedWhole
from cce_torchrec.spans import span


class CCEEmbeddingCollection(ShardedWhole, traced.Traceable, EmbeddingCollectionInterface):
    """Embeddings of every id of CCE and plain tables, as `EmbeddingCollection` returns them.

    Called with a KeyedJaggedTensor, returns a dictionary from feature name (`feature@table` where
    tables share a feature) to a JaggedTensor of embeddings [ids, embedding_dim].

    Args:
        tables: CCE tables (their pooling is not read) and plain `EmbeddingConfig`s.
        device: see `CCEEmbeddingBagCollection`.
        need_indices: return the ids as the weights of each JaggedTensor.
        bounds_check_mode: see `CCEEmbeddingBagCollection`.
        output_order: see `CCEEmbeddingBagCollection`.

    Raises:
        ValueError: tables of different embedding_dim, or what `CCEEmbeddingBagCollection` refuses.
    """

    def __init__(
        self,
        tables: Sequence[CCEEmbeddingBagConfig | EmbeddingConfig],
        device: torch.device | str | None = None,
        need_indices: bool = False,
        bounds_check_mode: BoundsCheckMode = BoundsCheckMode.WARNING,
        output_order: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        tables = with_features(tables)
        dims = {table.name: table.embedding_dim for table in tables}
        if len(set(dims.values())) != 1:
            raise ValueError(
                f"the tables of an EmbeddingCollection share one embedding_dim; got {dims}; use "
                "a collection for each"
            )
        self._configs = list(tables)
        self._need_indices = need_indices
        self.bags = CCEEmbeddingBagCollection(
            [_with_bags(table) for table in tables], device, False, bounds_check_mode, output_order
        )

        self.register_load_state_dict_pre_hook(take_old_names_of_sequences)

    @traced.with_types
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Embeddings of the ids of `features`; nothing of `features` is written to.

        Raises:
            ValueError: a missing feature, a batch size per feature, lengths or offsets that do not
                fit, or an id out of bounds in FATAL mode.
        """
        output = self.bags.output
        if traced.is_traced(features):
            vectors = traced.each_by_itself(self.bags, features)
            return sequences(output, vectors, features, self._need_indices)
        check_one_batch_size(features)
        with span("input_check"):
            features = self.bags.input_check(features)
        slots = select_slots(features, [slot.feature for slot in output.slots])
        each = bags_of_one(slots, [slots.stride()])
        each.length_per_key()  # `to_dict` asks for it, and so the expansion knows it as well
        with span("expand"):
            self.bags.begin_lookup()
            rows = self.bags.expansion(each, self.bags.bounds_check).to_dict()
        inner = self.bags.embedding_bag_collection
        vectors = {}
        with span("lookup"):
            for config in inner.embedding_bag_configs():
                for name in config.feature_names:
                    bag = inner.embedding_bags[config.name]
                    # float32 of tables of any type, as TorchRec's own collection gives them.
                    vectors[name] = bag(rows[name].values(), rows[name].offsets()).float()
        self.bags.refuse_late_gradients(vectors.values())
        with span("output"):
            return sequences(output, vectors, features, self._need_indices)

    def embedding_configs(self) -> list[BaseEmbeddingConfig]:
        """The tables as configured (or finalized), one entry per logical table."""
        return with_current_configs(self._configs, self.bags.embedding_bag_configs())

    def need_indices(self) -> bool:
        """Whether ids are returned beside their embeddings."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """Width of every embedding."""
        return self._configs[0].embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        """Keys of the output, by table."""
        names = iter(self.bags.output.names)
        return [[next(names) for _ in config.feature_names] for config in self._configs]

    @property
    def embeddings(self) -> nn.ModuleDict:
        """The modules with the weights, by name; see `CCEEmbeddingBagCollection.embedding_bags`."""
        return self.bags.embedding_bags

    @property
    def device(self) -> torch.device:
        """Where codebooks and codes live."""
        return self.bags.device

    @property
    def num_invalid_ids(self) -> int:
        """Ids out of bounds seen so far (bounds_check_mode WARNING)."""
        return self.bags.num_invalid_ids

    def reset_parameters(self) -> None:
        """Fresh codebooks, and codes back at their hash."""
        self.bags.reset_parameters()


# A function, as torch marks the hooks that it is given, which methods do not allow.
def take_old_names_of_sequences(
    module: Any, state: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """Renames what an `EmbeddingCollection` calls otherwise; `module` may be sharded."""
    take_old_names(module.bags.embedding_bag_configs(), state, f"{prefix}bags.")


def with_current_configs(
    configs: Sequence[BaseEmbeddingConfig], bags: Sequence[EmbeddingBagConfig]
) -> list[BaseEmbeddingConfig]:
    """`configs`, CCE tables as the collection of `bags` has them by now."""
    now = {config.name: config for config in bags}
    return [now[c.name] if is_cce(c) else c for c in configs]


def check_one_batch_size(features: KeyedJaggedTensor) -> None:
    """Refuses a KJT with a batch size per feature.

    Raises:
        ValueError: saying what to give.
    """
    # A TensorDict has none: TorchRec makes one batch size of it.
    if isinstance(features, KeyedJaggedTensor):
        traced.with_one_batch_size(features)


def sequences(
    output: LogicalOutput,
    vectors: dict[str, torch.Tensor],
    features: KeyedJaggedTensor,
    need_indices: bool,
) -> dict[str, JaggedTensor]:
    """Embeddings of each logical feature, from those of its chunks [ids, s]."""
    jagged = features.to_dict()
    out = {}
    for i in output.order:
        own = jagged[output.slots[i].feature]
        out[output.names[i]] = JaggedTensor(
            values=torch.cat([vectors[chunk] for chunk in output.physical[i]], dim=1),
            lengths=own.lengths(),
            weights=own.values() if need_indices else None,
        )
    return out


def _with_bags(table: CCEEmbeddingBagConfig | EmbeddingConfig) -> EmbeddingBagConfig:
    if not isinstance(table, EmbeddingBagConfig):
        shared = {field.name for field in fields(EmbeddingBagConfig)}
        kept = {f.name: getattr(table, f.name) for f in fields(table) if f.name in shared}
        # The sum over a bag of one id is its embedding.
        return EmbeddingBagConfig(**kept, pooling=PoolingType.SUM)
    if table.pooling != PoolingType.SUM:
        raise ValueError(
            f"table {table.name!r}: pooling {table.pooling} has no meaning in a sequence; leave it"
        )
    return table
