"""Private attributes of torch, TorchRec, FBGEMM and Python: all that this project reads or sets.

Seen in torch 2.11 and 2.13, TorchRec 1.6.1 to 1.9.2 and FBGEMM 1.6.0 and 1.8.0. Each function says
what breaks if a later version has it no more. A test looks for others in the rest of the package.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torch.export import ExportedProgram
from torch.fx.experimental import _config as fx_config
from torch.nn.parallel import DistributedDataParallel

__all__ = [  # public types of torch that live in a private package
    "EnumerableShardingSpec",
    "Shard",
    "ShardMetadata",
    "ShardedTensor",
    "ShardedTensorMetadata",
    "TensorProperties",
]

# --- Python --------------------------------------------------------------------------------------


def before_threads_end(call: Callable[[], Any]) -> None:
    """Has `call` called when the program ends, before Python stops its executors' threads.

    `atexit` comes after that, when clients of object stores, which use such threads, fail. Without
    it, a checkpoint that is on its way to an object store when the program ends is lost (as it is
    from Python 3.12 on, where no thread starts any more by then).
    """
    threading._register_atexit(call)  # type: ignore[attr-defined]  # in no stub


# --- torch ---------------------------------------------------------------------------------------


def sharded_tensor(
    local: Sequence[Shard], whole: ShardedTensorMetadata, group: dist.ProcessGroup | None
) -> ShardedTensor:
    """A ShardedTensor of which this rank has the shards `local`, without a collective.

    Without it, every `state_dict()` would have to gather what all ranks know already.
    """
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        list(local), whole, process_group=group
    )


def group_of(value: ShardedTensor) -> dist.ProcessGroup | None:
    """The ranks that share `value`. Without it, checkpoints of tables that grew do not load."""
    return value._process_group


def become(instance: Any, kind: type) -> None:
    """Makes `instance` one of `kind`, a subclass of its class with no state of its own to set up.

    For modules that TorchRec makes itself, with no hook for another class. Where that fails, so do
    int32 rows on GPUs and the compiled backward on CPUs; FBGEMM's own forms do the same, slower.
    """
    instance.__class__ = kind


def version_of(tensor: torch.Tensor) -> int | None:
    """How often `tensor` was written in place; None where torch does not count (inference mode).

    Autograd counts by it. Without it, what was computed from codes would have to be computed anew
    for every batch.
    """
    try:
        return tensor._version
    except RuntimeError:
        return None


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """The buffers of `module` itself, tensors or None by name.

    As `getattr` gives them one by one, in a tenth of the time; without it lookups are that slower.
    """
    return module._buffers


def fp32_precision(backend: str, operation: str) -> str:
    """How float32 products are rounded: "ieee", "tf32", "bf16" or "none" (as above it)."""
    return torch._C._get_fp32_precision_getter(backend, operation)


def set_fp32_precision(backend: str, operation: str, precision: str) -> None:
    """Sets what `fp32_precision` tells.

    Not by torch.backends, whose attribute of mkldnn sets everything (torch 2.11 to 2.13). Without
    it, K-means by torch and FAISS on a GPU would round to TF32 where a job allows it.
    """
    torch._C._set_fp32_precision_setter(backend, operation, precision)


def profiler_enabled() -> bool:
    """Whether torch.profiler, or an older profiler of torch, records this thread.

    Without it, ranges would have to be made in every step, for nobody as a rule.
    """
    return torch.autograd._profiler_enabled()


def default_store() -> dist.Store:
    """The store of the job's process group, which outlives a rank that fails.

    Without it, a rank that fails by itself could not tell the others why.
    """
    return dist.distributed_c10d._get_default_store()


# --- Optimizers ----------------------------------------------------------------------------------


def optimizers_in_backward(parameter: torch.Tensor) -> list[torch.optim.Optimizer]:
    """Those that `apply_optimizer_in_backward` gave a parameter of an unsharded module.

    Without it, a clustering step would not reset their state, nor a checkpoint keep it.
    """
    return list(getattr(parameter, "_in_backward_optimizers", []))


def optimizer_class_in_backward(parameter: torch.Tensor) -> str:
    """The name of the class that `apply_optimizer_in_backward` was given, or "".

    Without it, plans would count no optimizer state.
    """
    classes = getattr(parameter, "_optimizer_classes", [])
    return classes[0].__name__ if classes else ""


def copy_optimizer_in_backward(source: torch.Tensor, target: torch.Tensor) -> None:
    """Gives `target` the optimizer in backward of `source`, for the planner, which asks for it.

    Without it, plans of CCE tables would have the dense kernel.
    """
    for name in ("_in_backward_optimizers", "_optimizer_classes", "_optimizer_kwargs"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


def settings_in_backward(parameter: torch.Tensor) -> dict[str, Any]:
    """What `apply_optimizer_in_backward` was given beside the class.

    Without it, nothing would tell of settings that FBGEMM's kernels on CPUs ignore.
    """
    given = getattr(parameter, "_optimizer_kwargs", [])
    return dict(given[0]) if given else {}


def keep_apart(parameter: torch.Tensor, key: str) -> None:
    """Has TorchRec group the table of `parameter` with none that lacks the same `key`.

    Without it, frozen tables would share kernels with others, and be trained with them.
    """
    parameter._optimizer_kwargs = [{**settings_in_backward(parameter), "_batch_key": key}]  # type: ignore[attr-defined]  # TorchRec's


def wrapped_optimizer(optimizer: Any) -> Any | None:
    """The optimizer inside TorchRec's wrappers (KeyedOptimizerWrapper, WarmupOptimizer), or None.

    Without it, the state of wrapped dense optimizers would be missing from checkpoints.
    """
    return getattr(optimizer, "_optimizer", None)


def warmup_parameter(optimizer: Any) -> torch.Tensor:
    """The parameter of no model of which TorchRec's WarmupOptimizer keeps how far it is.

    Without it, the warm-up of a resumed run would begin anew.
    """
    return optimizer._warmup_param


def averages_models(optimizer: Any) -> bool:
    """Whether it is TorchRec's SemisyncOptimizer, with a second optimizer and counters inside.

    Without it, a resumed run would lose them and say nothing.
    """
    return hasattr(optimizer, "_global_optimizer")


def is_optimizer_of(optimizer: Any, kernel: nn.Module) -> bool:
    """Whether TorchRec's fused `optimizer` is that of FBGEMM's module `kernel`.

    Without it, a resumed run would train at the learning rate that it was configured with.
    """
    return getattr(optimizer, "_emb_module", None) is kernel


# --- TorchRec's sharded modules ------------------------------------------------------------------


def lookups_of(module: nn.Module) -> list[nn.Module]:
    """The lookup of each sharding of a sharded collection, ours or TorchRec's; of others none.

    They hold every table of a rank: without them nothing works.
    """
    return list(getattr(module, "_lookups", []))


def torchrec_kernels(lookup: nn.Module) -> Iterable[Any]:
    """TorchRec's modules around FBGEMM's, of one lookup; see `lookups_of`."""
    while isinstance(lookup, DistributedDataParallel):
        lookup = lookup.module
    return getattr(lookup, "_emb_modules", [])


def fused_kernels(lookups: Iterable[nn.Module]) -> Iterator[tuple[list[Any], Any]]:
    """Each group of tables of `lookups` with the FBGEMM module that holds them."""
    for lookup in lookups:
        for kernel in torchrec_kernels(lookup):
            yield kernel._config.embedding_tables, kernel.emb_module


def fused_groups(lookups: Iterable[nn.Module]) -> Iterator[tuple[list[Any], list[dict[str, Any]]]]:
    """Each group of tables of `lookups` with the parameter groups of its fused optimizer, if any.

    Without it, a clustering step would rewrite tables whose learning rate is zero.
    """
    for lookup in lookups:
        for kernel in torchrec_kernels(lookup):
            optimizer = getattr(kernel, "fused_optimizer", None)
            groups = list(optimizer.param_groups) if optimizer is not None else []
            yield kernel._config.embedding_tables, groups


def shardings_of(inner: nn.Module) -> list[Any]:
    """TorchRec's sharding objects of a sharded EmbeddingBagCollection, one per lookup.

    Ids are distributed by them: without them nothing works.
    """
    return inner._embedding_shardings  # type: ignore[return-value]  # torch types it as a module


def ranks_of(sharding: Any) -> dist.ProcessGroup:
    """The process group of a sharding; see `shardings_of`."""
    return sharding._pg


def output_dists(inner: nn.Module) -> Iterable[Any]:
    """What sends each lookup's output back; sequences are put together from it."""
    return inner._output_dists  # type: ignore[return-value]  # torch types it as a module


def sorts_columns(inner: nn.Module) -> bool:
    """Whether an output distribution changes the order of what its lookup gives.

    TorchRec's column-wise sharding has it put the shards of a feature together. Without it, the
    outputs of such a plain table would be exchanged on a rank that is alone.
    """
    return any(getattr(sent, "_callbacks", None) for sent in output_dists(inner))


def input_dists(module: nn.Module) -> list[Any]:
    """What TorchRec's train pipelines look at to see where a module gets its input from."""
    return module._input_dists  # type: ignore[return-value]  # torch types it as a module


def output_features(inner: nn.Module) -> tuple[list[str], list[int]]:
    """Names and widths of the features that a sharded EmbeddingBagCollection gives, in its order.

    Without them the output cannot be put into the configured order.
    """
    return inner._embedding_names, inner._embedding_dims  # type: ignore[return-value]  # as above


def uncombined_features(inner: nn.Module) -> tuple[list[str], list[int]]:
    """The same before the parts of a feature are put together; sequences have it."""
    return inner._uncombined_embedding_names, inner._uncombined_embedding_dims  # type: ignore[return-value]  # as above


def leave_input_to_us(inner: nn.Module) -> None:
    """Tells a sharded EmbeddingBagCollection that ids reach it otherwise, and MEAN is taken later.

    Without the first, its first batch would make an input distribution that is never used; without
    the second, it would divide the means of tables cut by rows once more.
    """
    inner._has_uninitialized_input_dist = False  # type: ignore[assignment]  # as above
    inner._has_mean_pooling_callback = False  # type: ignore[assignment]  # as above


PROCESSED_COLLECTION = "_embedding_bag_collection"
"""Where TorchRec's FeatureProcessedEmbeddingBagCollection, sharded or not, has its collection; part
of the names of its parameters."""


def processed_collection(module: nn.Module) -> Any:
    """The collection inside TorchRec's FeatureProcessedEmbeddingBagCollection."""
    return getattr(module, PROCESSED_COLLECTION)


def copy_all(to: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copies each of `values` into its place; few launches on a GPU, however many there are."""
    torch._foreach_copy_(to, values)


def assert_in_graph(condition: torch.Tensor, message: str) -> None:
    """Has a graph that is being recorded fail with `message` where `condition` is false."""
    torch._assert_async(condition, message)


def sizes_are_any() -> Any:
    """A context in which torch.export takes sizes 0 and 1 for like others.

    Without it a program is made for batches of two rows or more.
    """
    return fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]  # added later


def compile_package(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> Path:
    """Compiles `program` by AOTInductor into the file `path`, which says `metadata` too."""
    from torch import _inductor  # here: it takes a second to load

    options = {"aot_inductor.metadata": metadata}
    made = _inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=options
    )
    return Path(made)


def load_package(path: Path) -> Any:
    """What `compile_package` wrote, to be called with tensors."""
    from torch import _inductor

    return _inductor.aoti_load_package(str(path))


def package_metadata(package: Any) -> dict[str, str]:
    """What `compile_package` was told to write, and torch's own."""
    return dict(package.loader.get_metadata())
