"""CCEEmbeddingBagCollection: TorchRec's EmbeddingBagCollection with compressed tables in it."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    EmbeddingBagConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from cce_torchrec.codes.chunk_codes import ChunkCodes, codes_of, local_codes
from cce_torchrec.codes.helper_rows import save_helper_rows
from cce_torchrec.config import is_cce
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.lookup.expansion import Expansion
from cce_torchrec.lookup.features import with_weights, without_weights
from cce_torchrec.lookup.frozen_main import FrozenMain
from cce_torchrec.lookup.inputs import InputCheck
from cce_torchrec.lookup.output import LogicalOutput, divides_by_length, tensor_of
from cce_torchrec.lookup.pending import PendingLookup
from cce_torchrec.lookup.table_lookup import TableLookup
from cce_torchrec.modules import traced
from cce_torchrec.modules.codebook_init import CodebookInit
from cce_torchrec.modules.foreign_state import refuse_foreign_state, refuse_shards
from cce_torchrec.modules.old_names import take_old_names
from cce_torchrec.modules.quantization import ChecksNames
from cce_torchrec.modules.sharder_hint import ShardedWhole
from cce_torchrec.modules.table_modules import TableModules
from cce_torchrec.spans import span
from cce_torchrec.table import physical_feature, physical_table, tables_of

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=BaseEmbeddingConfig)


class CCEEmbeddingBagCollection(
    ShardedWhole, traced.Traceable, ChecksNames, EmbeddingBagCollectionInterface
):
    """Pooled embeddings of CCE and plain tables, as `EmbeddingBagCollection` returns them.

    Called with a KeyedJaggedTensor that holds (at least) the configured features, returns a
    KeyedTensor [B, sum of embedding_dim] with the logical feature names in configured order
    (`feature@table` where tables share a feature).

    Args:
        tables: CCE and plain tables, in the order of the output.
        device: where codebooks and codes live, "meta" too; None is torch's default device, that of
            `with torch.device(...)` included.
        is_weighted: pool by the KJT's per-sample weights. MEAN is then sum(w * x) / L.
        bounds_check_mode: what happens to an id outside [0, num_embeddings): FATAL raises,
            WARNING (the default) and IGNORE read id 0, as FBGEMM does; NONE does not look.
        output_order: names of the output in another order than the tables', which a model may read
            by position; see `joint_table`.

    Raises:
        ValueError: duplicate table names, a feature twice in a table, unsupported pooling, other
            names in `output_order`.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        device: torch.device | str | None = None,
        is_weighted: bool = False,
        bounds_check_mode: BoundsCheckMode = BoundsCheckMode.WARNING,
        output_order: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        tables = with_features(tables)
        _check_tables(tables)
        _warn_of_larger(tables)
        self.tables = tables_of(tables)
        """As they are now; `embedding_bag_configs` reads their configurations."""
        self._is_weighted = is_weighted
        self._device = torch.device(device if device is not None else torch.get_default_device())
        self.bounds_check_mode = bounds_check_mode
        self.bounds_check = BoundsCheck(bounds_check_mode)
        physical = [p for config in tables for p in physical_configs(config, is_weighted)]
        self.embedding_bag_collection = EmbeddingBagCollection(
            tables=physical, device=self._device, is_weighted=is_weighted
        )
        inner = self.embedding_bag_collection
        inner.embedding_bags = TableModules(self.tables, inner.embedding_bags)
        self.codes = nn.ModuleDict(
            {
                table.name: ChunkCodes(table, range(len(table.chunks)), self._device)
                for table in self.tables
                if table.cce is not None
            }
        )
        self._every_codes = [local_codes(self.codes, name) for name in self.codes]
        self.output = LogicalOutput.from_configs(tables, is_weighted, output_order)
        names = [feature for config in physical for feature in config.feature_names]
        dims = [config.embedding_dim for config in physical for _ in config.feature_names]
        self._columns = self.output.column_order(names, dims)
        self.input_check = InputCheck(self.output.slots, is_weighted)
        self.expansion = Expansion(self._table_lookups(), self.output.slots, names)
        self.frozen_main = FrozenMain(self)
        self.register_state_dict_post_hook(_save_helper_rows)
        self.register_load_state_dict_pre_hook(_check_state)

    def restore_main(self) -> None:
        """Main rows that no optimizer trains become what they were (recipe "rare")."""
        bags = self.embedding_bag_collection.embedding_bags
        rows = [item for table in self.tables for item in table.frozen_rows.items()]
        self.frozen_main.restore([bags[name].weight.data[:count] for name, count in rows])

    def _table_lookups(self) -> list[TableLookup]:
        lookups, position = [], 0
        for table in self.tables:
            slots = list(range(position, position + len(table.config.feature_names)))
            position += len(slots)
            codes = codes_of(self.codes, table.name)
            columns = list(range(len(codes.chunks))) if codes is not None else []
            lookups.append(TableLookup(table, slots, codes, columns))
        return lookups

    @traced.with_types
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled embeddings of `features`; nothing of `features` is written to.

        Raises:
            ValueError: a missing feature, missing weights, lengths, offsets, batch sizes or inverse
                indices that do not fit, or an id out of bounds in FATAL mode.
        """
        if traced.is_traced(features):
            self.restore_main()
            return traced.pooled(self, features)
        with span("input_check"):
            features = self.input_check(features)
        divisor = self.output.divisor(features)
        slots = select_slots(features, [slot.feature for slot in self.output.slots])
        slots.length_per_key()  # TorchRec's own collection asks for it, and then the rows are known
        self.begin_lookup()
        with span("expand"):
            rows = self.expansion(slots, self.bounds_check, features.inverse_indices_or_none())
        with span("lookup"):
            pooled = self.embedding_bag_collection(rows)
        self.refuse_late_gradients([pooled.values()])
        with span("output"):
            return self.output.assemble(pooled.values(), self._columns, divisor)

    def begin_lookup(self) -> None:
        """Before ids are expanded and rows are read, of this or the next batch."""
        for codes in self._every_codes:
            codes.begin_batch()
        self.restore_main()

    def refuse_late_gradients(self, outputs: Iterable[torch.Tensor]) -> None:
        """Has the gradient of a lookup's `outputs` refused if codes change before it comes."""
        trained = [output for output in outputs if output.requires_grad]
        if not trained or torch.compiler.is_compiling():  # a graph would end at the hook
            return
        hook = PendingLookup(self.codes, self._every_codes)
        for output in trained:
            output.register_hook(hook)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables as configured (or finalized), one entry per logical table."""
        return [table.config for table in self.tables]

    def is_weighted(self) -> bool:
        """Whether bags are pooled by per-sample weights."""
        return self._is_weighted

    @property
    def embedding_bags(self) -> nn.ModuleDict:
        """The modules with the weights, by name: of plain tables, and of the chunks of CCE ones."""
        return self.embedding_bag_collection.embedding_bags

    @property
    def device(self) -> torch.device:
        """Where codebooks and codes live."""
        return self._device

    @property
    def num_invalid_ids(self) -> int:
        """Ids out of bounds seen so far (bounds_check_mode WARNING)."""
        return self.bounds_check.num_invalid

    def reset_parameters(self) -> None:
        """Fresh codebooks, and codes back at their hash."""
        self.embedding_bag_collection.reset_parameters()
        self.frozen_main.forget()
        for name in self.codes:
            local_codes(self.codes, name).reset_parameters()


# Functions, as torch marks the hooks that it is given, which methods do not allow.
def _save_helper_rows(
    module: CCEEmbeddingBagCollection, state: dict[str, Any], prefix: str, _: Any
) -> None:
    save_helper_rows(module.embedding_bag_configs(), state, prefix)


def _check_state(
    module: CCEEmbeddingBagCollection, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    configs = module.embedding_bag_configs()
    take_old_names(configs, state, prefix)
    refuse_shards(state, prefix)
    refuse_foreign_state(configs, state, prefix)


def physical_configs(config: EmbeddingBagConfig, is_weighted: bool) -> list[EmbeddingBagConfig]:
    """The TorchRec tables behind one logical table: one per chunk, or the plain table itself."""
    # FBGEMM's MEAN would divide by the rows of a bag, which are two an id.
    pooling = PoolingType.SUM if divides_by_length(config, is_weighted) else config.pooling
    plain = {field.name: getattr(config, field.name) for field in fields(EmbeddingBagConfig)}
    if not is_cce(config):
        # Named by the table too: tables that share a feature read different rows of it.
        names = [physical_feature(config.name, f, None) for f in config.feature_names]
        return [EmbeddingBagConfig(**{**plain, "feature_names": names, "pooling": pooling})]
    return [
        EmbeddingBagConfig(
            **{
                **plain,
                "name": physical_table(config.name, chunk),
                "num_embeddings": config.rows_per_chunk,
                "embedding_dim": config.chunk_dim,
                "feature_names": [
                    physical_feature(config.name, f, chunk) for f in config.feature_names
                ],
                "pooling": pooling,
                "init_fn": CodebookInit(config),
            }
        )
        for chunk in range(config.num_chunks)
    ]


def select_slots(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """`features` with exactly the keys `names`, in order; a feature may be named twice."""
    keys = features.keys()
    if keys == names:
        return features
    order = [keys.index(name) for name in names]
    weights = features.weights_or_none()
    if weights is None or not weights.requires_grad:
        return features.permute(order, tensor_of(tuple(order), features.device()))
    # FBGEMM's permute has no gradient where a feature is left out or taken twice.
    by_feature = weights.split(features.length_per_key())
    permuted = without_weights(features).permute(order)
    return with_weights(permuted, torch.cat([by_feature[i] for i in order]))


def _warn_of_larger(tables: Sequence[EmbeddingBagConfig]) -> None:
    """Names the tables that take more bytes compressed than whole."""
    for config in tables:
        if is_cce(config) and config.table_bytes > config.full_bytes:
            logger.warning(
                "table %r takes %s bytes compressed, and %s as a plain table; use fewer rows, or "
                "an EmbeddingBagConfig",
                config.name,
                f"{config.table_bytes:,}",
                f"{config.full_bytes:,}",
            )


def with_features(tables: Sequence[Config]) -> list[Config]:
    """`tables`; one without feature_names is read by a feature of its name, as in TorchRec."""
    out = []
    for config in tables:
        if not config.feature_names:
            config = copy.copy(config)  # TorchRec writes into the caller's
            config.feature_names = [config.name]
        out.append(config)
    return out


def _check_tables(tables: Sequence[EmbeddingBagConfig]) -> None:
    for name, count in Counter(config.name for config in tables).items():
        if count > 1:
            raise ValueError(f"table {name!r} is configured {count} times; names must differ")
    for config in tables:
        if "#" in config.name:
            raise ValueError(
                f"table {config.name!r}: '#' marks the chunks of CCE tables; rename it"
            )
        if len(set(config.feature_names)) < len(config.feature_names):
            raise ValueError(f"table {config.name!r} names a feature twice: {config.feature_names}")
        if config.pooling not in (PoolingType.SUM, PoolingType.MEAN):
            raise ValueError(
                f"table {config.name!r}: pooling {config.pooling!r} is not SUM or MEAN"
            )
