"""Plans of logical tables by TorchRec's planner, with codes counted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner import types as planner_types
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import (
    EmbeddingPerfEstimator,
    EmbeddingStorageEstimator,
)
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec.collectives import from_first_rank, ranks_of_call, same_task
from cce_torchrec.config import CCEEmbeddingBagConfig, is_cce
from cce_torchrec.distributed.embedding_bag_sharder import CCEEmbeddingBagCollectionSharder
from cce_torchrec.distributed.embedding_collection import CCEEmbeddingCollectionSharder
from cce_torchrec.distributed.sharders import get_default_sharders
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.planning.columns import ColumnsAlike, worth_splitting
from cce_torchrec.planning.proposer import proposers
from cce_torchrec.planning.storage import CodeStorageEstimator
from cce_torchrec.table import logical_table

_KINDS = {
    "tw": [ShardingType.TABLE_WISE.value],
    "cw": [ShardingType.COLUMN_WISE.value],
    "rw": [ShardingType.ROW_WISE.value],
    "auto": [ShardingType.TABLE_WISE.value, ShardingType.COLUMN_WISE.value],
}
# Without this choice TorchRec's planner may put tables into the host's memory, behind a cache.
_IN_DEVICE_MEMORY = [EmbeddingComputeKernel.DENSE.value, EmbeddingComputeKernel.FUSED.value]
_RESERVED = 0.15
"""Share of a device's memory that plans leave to everything but tables (TorchRec's default)."""


def _topology(world_size: int, device: torch.device, memory_bytes: int | None) -> Topology:
    """The machine as it is: the GPU's own memory, or the CPU's share per rank."""
    on_gpu = device.type == "cuda"
    if memory_bytes is None and on_gpu:
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
    caps = {"hbm_cap_bytes" if on_gpu else "ddr_cap_bytes": memory_bytes}
    caps = {name: value for name, value in caps.items() if value is not None}
    # TorchRec 1.8 warns of topologies that come from elsewhere.
    return planner_types.TopologyFactory.create_topology(
        planner_types.TrainerConfig(world_size=world_size, **caps),
        kernel_config=planner_types.KernelConfig(compute_device=device.type),
    )


class _Reservation(HeuristicalStorageReservation):
    """Leaves its share of a CPU's memory too; TorchRec's form leaves one of GPUs' alone."""

    def reserve(self, topology: Topology, *args: Any, **kwargs: Any) -> Topology:
        """What is left of `topology` for tables."""
        if topology.compute_device == "cpu":
            topology = copy.deepcopy(topology)
            for device in topology.devices:
                device.storage.ddr = int((1 - _RESERVED) * device.storage.ddr)
        return super().reserve(topology, *args, **kwargs)


def _reservation(dense_bytes: int) -> _Reservation:
    with warnings.catch_warnings():  # that its guess of the dense size is wrong; we give ours
        warnings.simplefilter("ignore", FutureWarning)
        return _Reservation(percentage=_RESERVED, dense_tensor_estimate=dense_bytes)


class _Enumerator(EmbeddingEnumerator):
    """Offers ROW_WISE on CPUs too; which table may be cut is in the constraints."""

    def enumerate(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]
    ) -> list[ShardingOption]:
        """The forms that each table of `module` may have."""
        return super().enumerate(module, [_offering_row_wise(sharder) for sharder in sharders])


def _offering_row_wise(sharder: Any) -> Any:
    if not isinstance(sharder, CCEEmbeddingBagCollectionSharder | CCEEmbeddingCollectionSharder):
        return sharder
    sharder = copy.copy(sharder)  # the caller's offers what it did, to planners without constraints
    sharder.offers_row_wise = True
    return sharder


def _constraints(
    table: EmbeddingBagConfig, kind: str, kernels: list[str] | None
) -> ParameterConstraints:
    """Where one table may go."""
    if kind == "dp":
        return ParameterConstraints(sharding_types=[ShardingType.DATA_PARALLEL.value])
    if not is_cce(table):
        return ParameterConstraints(sharding_types=_KINDS[kind], compute_kernels=kernels)
    return ParameterConstraints(
        sharding_types=_KINDS[kind],
        compute_kernels=kernels,
        min_partition=table.chunk_dim,  # a shard of columns is of whole chunks
        # The estimate of time counts the rows that are read: main and helper for each id.
        pooling_factors=[float(table.rows_per_id)] * len(table.feature_names or [table.name]),
    )


def _room(topology: Topology) -> float:
    """Bytes of a rank for tables."""
    storage = topology.devices[0].storage
    return (1 - _RESERVED) * (storage.hbm if topology.compute_device == "cuda" else storage.ddr)


def _too_large(table: CCEEmbeddingBagConfig, topology: Topology) -> bool:
    """Whether some rank could not hold its codes if the chunks were spread."""
    chunks = -(-table.num_chunks // topology.world_size)
    return table.code_bytes * chunks // table.num_chunks > _room(topology)


def _kinds(tables: Sequence[EmbeddingBagConfig], kind: str, topology: Topology) -> dict[str, str]:
    """The kind that each table may be of, where the caller names none for it."""
    out = {table.name: kind if is_cce(table) else "tw" for table in tables}
    split = worth_splitting(tables, topology.world_size, _room(topology))
    for table in filter(is_cce, tables):
        if kind == "rw" and not table.code_bits:
            out[table.name] = "tw"  # nothing of it grows with its ids
        elif kind == "auto" and _too_large(table, topology):
            out[table.name] = "rw"
        elif kind == "auto" and table.name not in split:
            out[table.name] = "tw"
    return out


def _check_names(tables: Sequence[EmbeddingBagConfig], **given: Collection[str]) -> None:
    for argument, names in given.items():
        unknown = set(names) - {table.name for table in tables}
        if unknown:
            raise ValueError(
                f"{argument} names {sorted(unknown)}, which are no tables of the model; choose "
                f"among {[table.name for table in tables]}"
            )
    twice = sorted(set.intersection(*map(set, given.values())))
    if twice:
        raise ValueError(f"tables {twice} are in {' and in '.join(given)}; name each in one")
    hashed = [t.name for t in tables if is_cce(t) and not t.code_bits]
    if by_rows := sorted(set(given["row_wise"]) & set(hashed)):
        raise ValueError(
            f"row_wise names {by_rows}, which have no codes to spread (learned_codes=False, or "
            "num_rows=1); leave them out"
        )


def make_planner(
    tables: Sequence[EmbeddingBagConfig],
    world_size: int,
    device: torch.device,
    kind: str = "auto",
    *,
    batch_size: int = 512,
    memory_bytes: int | None = None,
    dense_bytes: int = 1,
    data_parallel: Collection[str] = (),
    row_wise: Collection[str] = (),
    unified_memory: bool = False,
) -> EmbeddingShardingPlanner:
    """TorchRec's planner for these logical tables.

    Args:
        kind: "tw" (chunks together), "cw" (chunks of a table spread over ranks), "rw" (codes of a
            table spread over ranks by ids) or "auto" (chosen table by table: "tw" or "cw", and
            "rw" where codes of one rank's chunks would not fit its memory).
        batch_size: global.
        memory_bytes: per rank, of which 15 % are left to other things than tables; by default
            the GPU's own, on a CPU TorchRec's default.
        dense_bytes: of the parameters that are no tables, with their optimizer state.
        data_parallel: names of tables to keep whole on every rank, whatever `kind` says; they
            train by an optimizer over `data_parallel_parameters`.
        row_wise: names of tables to spread by ids (plain ones: by rows), whatever `kind` says.
        unified_memory: on GPUs, whether tables may be in the host's memory, behind a cache or
            not, where they do not fit the GPU's; otherwise there is no plan then.

    Raises:
        ValueError: an unknown kind, or an unknown table.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown plan {kind!r}; choose one of {list(_KINDS)}")
    _check_names(tables, data_parallel=data_parallel, row_wise=row_wise)
    topology = _topology(world_size, device, memory_bytes)
    named = dict.fromkeys(row_wise, "rw") | dict.fromkeys(data_parallel, "dp")
    kernels = None if unified_memory or device.type != "cuda" else _IN_DEVICE_MEMORY
    kinds = _kinds(tables, kind, topology) | named
    constraints = {t.name: _constraints(t, kinds[t.name], kernels) for t in tables}
    per_rank = max(1, batch_size // world_size)
    return EmbeddingShardingPlanner(
        topology=topology,
        batch_size=per_rank,
        enumerator=_Enumerator(
            topology=topology,
            batch_size=per_rank,
            constraints=constraints,
            estimator=[
                ColumnsAlike(EmbeddingPerfEstimator(topology=topology, constraints=constraints)),
                EmbeddingStorageEstimator(topology=topology, constraints=constraints),
                CodeStorageEstimator(topology, tables),  # last: it adds to what the others say
            ],
        ),
        proposer=proposers(len(tables)),
        storage_reservation=_reservation(dense_bytes),
        constraints=constraints,
    )


def make_plan(
    model: nn.Module,
    tables: Sequence[EmbeddingBagConfig],
    device: torch.device,
    kind: str = "auto",
    *,
    batch_size: int = 512,
    memory_bytes: int | None = None,
    data_parallel: Collection[str] = (),
    row_wise: Collection[str] = (),
    unified_memory: bool = False,
) -> ShardingPlan:
    """A collective plan of `model`: every rank of the default group calls it, all get the same.

    See `make_planner` for the arguments.

    Raises:
        ValueError: on every rank, if a table of the model's CCE collections is not in `tables`,
            arguments contradict each other, or those of one rank differ from another's.
        PlannerError: on every rank, if the tables do not fit.
    """
    options: dict[str, Any] = {
        "kind": kind,
        "batch_size": batch_size,
        "memory_bytes": memory_bytes,
        "data_parallel": sorted(data_parallel),
        "row_wise": sorted(row_wise),
        "unified_memory": unified_memory,
    }

    def prepared() -> tuple[EmbeddingShardingPlanner, Hashable]:
        _check_model(model, tables, {*data_parallel, *row_wise})
        dense = max(1, 6 * _dense_bytes(model, tables))  # gradients and Adam's moments, with room
        planner = make_planner(tables, dist.get_world_size(), device, dense_bytes=dense, **options)
        shapes = [f"{t.name} [{t.num_embeddings}, {t.embedding_dim}]" for t in tables]
        return planner, (device.type, str(options), str(shapes))

    what = "device, options and tables of make_plan"
    planner = same_task(prepared, what, ranks_of_call(None))
    # TorchRec's collective_plan leaves the other ranks waiting where the first one fails.
    return from_first_rank(lambda: planner.plan(model, get_default_sharders()))


def _check_model(
    model: nn.Module, tables: Sequence[EmbeddingBagConfig], named: Collection[str]
) -> None:
    """Refuses `tables` that leave some of the model out, and `named` ones that it has not."""
    names = {table.name for table in tables}
    collections = [m for m in model.modules() if isinstance(m, CCEEmbeddingBagCollection)]
    in_model = {t.name for collection in collections for t in collection.embedding_bag_configs()}
    if not in_model <= names:
        raise ValueError(
            f"tables {sorted(in_model - names)} are in the model, but not among the "
            f"{sorted(names)} to plan; their codes would not be counted. Pass every table of its "
            "collections"
        )
    parts = {
        logical_table(part) for name, _ in model.named_parameters() for part in name.split(".")
    }
    absent = sorted({*named} & names - parts)
    if absent:
        raise ValueError(
            f"data_parallel or row_wise names {absent}, of which the model has no parameters; "
            "leave out what it does not have"
        )


def _dense_bytes(model: nn.Module, tables: Sequence[EmbeddingBagConfig]) -> int:
    """Bytes of the parameters of `model` that are none of its `tables`."""
    names = {table.name for table in tables}
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if not names & {logical_table(part) for part in name.split(".")}
    )
