"""The trained weight of a plain table, wherever a job has left it."""

from __future__ import annotations

import importlib
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torchrec.distributed.types import ShardedTensor

from cce_torchrec.checkpoint import folder as folders
from cce_torchrec.checkpoint.location import location, store_of
from cce_torchrec.checkpoint.tensor_files import TensorReader
from cce_torchrec.checkpoint.whole_file import whole_file
from cce_torchrec.collectives import Ranks
from cce_torchrec.reasons import first_line

_BLOCK = 1 << 16
"""Rows that are copied at once."""
_NESTED = 3
"""Levels of dictionaries in which a file may have the state dict."""

Weight = torch.Tensor | np.ndarray[Any, Any]


def full_table(
    source: nn.Module | Mapping[str, Any] | str | Path,
    table: str,
    *,
    file: str | Path | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Weight:
    """The weight [N, D] of the plain table `table`, for `import_table`; it is not changed.

    Args:
        source: a model or a state dict, of a job on one device or, on all ranks together, of a
            sharded one; or a path: a file of torch.save, safetensors or numpy, a checkpoint of this
            package, or one of torch.distributed.checkpoint.
        table: its name, as `embedding_bags.NAME.weight` or `embeddings.NAME.weight` have it
            anywhere in a state dict, or the whole key.
        file: `.npy` on a disk that all ranks see, where the weight is put together, and which is
            mapped: needed for shards, saves memory where a checkpoint is read, and is not written
            for what is in memory or in a file already.
        process_group: ranks that share the tables of a sharded source; default: all.

    Returns:
        A tensor, or an array that numpy maps.

    Raises:
        ValueError: no such table, or several; a file that is damaged, where it has checksums (those
            of this package and of torch.save do), cannot be read, or is there already.
    """
    if isinstance(source, str | Path):
        return _from_path(location(source), table, file)
    state = source.state_dict() if isinstance(source, nn.Module) else source
    return _from_state(state, table, file, process_group)


def _from_state(
    state: Mapping[str, Any],
    table: str,
    file: str | Path | None,
    process_group: dist.ProcessGroup | None = None,
) -> Weight:
    value = state[_key(list(state), table)]
    if isinstance(value, ShardedTensor):
        return _put_together(value, table, file, process_group)
    # Where others keep their shards, only their own libraries know.
    if type(value) not in (torch.Tensor, nn.Parameter):  # a DTensor, say
        raise ValueError(
            f"table {table!r} is a {type(value).__name__}; save the job by "
            "torch.distributed.checkpoint, and give that folder"
        )
    return _checked(value.detach(), table)


def _key(keys: list[str], table: str) -> str:
    """The key of the table's weight.

    Raises:
        ValueError: there is none, or there are several.
    """
    if table in keys:
        return table
    # With the dots around it, as the name of one table may end that of another.
    ends = tuple(f"{kind}.{table}.weight" for kind in ("embedding_bags", "embeddings"))
    own = [key for key in keys if key.endswith(ends)]
    found = [key for key in own if key in ends or key.endswith(tuple(f".{end}" for end in ends))]
    if len(found) == 1:
        return found[0]
    weights = sorted(key for key in keys if key.endswith(".weight"))[:20]
    chunks = [key for key in keys if f".{table}#" in key]
    if chunks:
        raise ValueError(f"{table!r} is a CCE table (of {chunks[0]}, say), and no full one")
    what = f"{len(found)} tables {table!r}: {sorted(found)}" if found else f"no table {table!r}"
    raise ValueError(f"found {what}; give one of these keys: {found or weights}")


def _checked(value: Any, table: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{table!r} is a {type(value).__name__}, and a table is a tensor")
    if value.ndim != 2 or not value.is_floating_point():
        raise ValueError(
            f"{table!r} is {value.dtype} {list(value.shape)}, and a table is [ids, embedding_dim] "
            "of floating point"
        )
    return value


def _from_path(path: Path, table: str, file: str | Path | None) -> Weight:
    if not path.exists():
        raise ValueError(f"{path} is not there")
    if path.is_dir() or store_of(path) is not None:
        return _from_folder(path, table, file)
    found = read_file(path)
    if not isinstance(found, Mapping):
        return found if isinstance(found, np.ndarray) else _checked(found, table)
    return _from_state(_flat(found), table, file)


def read_file(path: Path) -> Any:
    """What a file of torch.save (mapped), safetensors or numpy (mapped) holds.

    Raises:
        ValueError: it cannot be read, or is damaged.
    """
    readers: dict[str, Callable[[Path], Any]] = {".npy": _npy, ".safetensors": _safetensors}
    try:
        return readers.get(path.suffix, _torch_file)(path)
    except Exception as error:  # of any kind: the unpickler's, the system's
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> ValueError:
    what = "no weight, state dict or checkpoint that can be read"
    return ValueError(f"{path} is {what} ({first_line(error)})")


def _npy(path: Path) -> Any:
    found = np.load(path, mmap_mode="r")
    if found.ndim != 2 or found.dtype.kind != "f":
        raise ValueError(f"{path} is {found.dtype} {list(found.shape)}, and a table is [ids, D]")
    return found


def _safetensors(path: Path) -> Any:
    try:
        return importlib.import_module("safetensors.torch").load_file(path)
    except ImportError as error:
        raise ValueError(f"{path} needs safetensors; pip install safetensors") from error


def _torch_file(path: Path) -> Any:
    # Mapped, as of a job's whole state one table is read; and without what a pickle may run.
    zipped = zipfile.is_zipfile(path)  # as torch.save has written for years
    if zipped:  # whose checksums torch does not look at
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise ValueError(f"damaged: the checksum of {bad} differs; copy it again")
    return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)


def _flat(found: Mapping[str, Any], level: int = 0) -> dict[str, Any]:
    """Tensors by key; `{"model": state_dict, ...}` and the like are common."""
    out: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, Mapping) and level < _NESTED:
            out |= {f"{key}.{name}": own for name, own in _flat(value, level + 1).items()}
        else:
            out[str(key)] = value
    return out


def _from_folder(path: Path, table: str, file: str | Path | None) -> Weight:
    reader, metadata, verified = folder_reader(path)
    tensors = {
        key: entry
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    key = _key(list(tensors), table)
    size, dtype = tensors[key].size, tensors[key].properties.dtype
    _checked(torch.empty(size, dtype=dtype, device="meta"), table)

    verified(key)

    def read(into: torch.Tensor) -> None:
        try:
            dcp.load({key: into}, storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as error:  # a file of another job's is missing or cut short
            raise _unreadable(path, next(iter(error.failures.values()))[0]) from error

    if file is None:
        value = torch.empty(size, dtype=dtype)
        read(value)
        return value
    if dtype not in (torch.float32, torch.float16, torch.float64):
        raise ValueError(f"table {table!r} is {dtype}, which .npy has not; leave `file` out")
    with whole_file(_new(file)) as writing:
        read(torch.from_numpy(_mapped(writing, tuple(size), dtype)))
    return np.load(file, mmap_mode="r")  # type: ignore[no-any-return]  # an array


def folder_reader(path: Path) -> tuple[Any, Metadata, Callable[[str], None]]:
    """What reads a checkpoint, of this package or of another job, and verifies a key's files.

    Raises:
        ValueError: it is neither, or cannot be read.
    """
    try:
        found = folders.find(path)
    except ValueError:
        if store_of(path) is not None or not (path / ".metadata").exists():
            raise
        reader = dcp.FileSystemReader(path)
        try:
            return reader, reader.read_metadata(), lambda key: None  # which has no checksums
        except Exception as error:  # whatever a damaged pickle leads to
            raise _unreadable(path / ".metadata", error) from error
    files = folders.read_manifest(found).files
    own = TensorReader(found, files, {})
    metadata = own.read_metadata()

    def verify(key: str) -> None:
        places = metadata.storage_data
        names = {place.file for index, place in places.items() if index.fqn == key}
        folders.verify(found, {name: files[name] for name in names})

    return own, metadata, verify


def _put_together(
    value: ShardedTensor,
    table: str,
    file: str | Path | None,
    process_group: dist.ProcessGroup | None,
) -> Weight:
    """The shards of all ranks in one file, each written by the rank that has it."""
    if file is None:
        raise ValueError(
            f"table {table!r} is sharded; give file=, an .npy on a disk that all ranks see, where "
            "its shards are put together"
        )
    # Under another name until all have written: a file that has its name is whole.
    ranks, size = Ranks(process_group), tuple(value.metadata().size)
    path = ranks.first(lambda: _new(file))
    writing = path.with_name(f".{path.stem}.shards{path.suffix}")
    try:
        # As float32, which tables are trained in, or in halves of it.
        ranks.first(lambda: _mapped(writing, size, torch.float32).flush())
        ranks.each(lambda: _write_shards(value, writing))
        ranks.first(lambda: writing.rename(path))
    finally:
        if ranks.rank == 0:
            writing.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]  # an array


def _new(file: str | Path) -> Path:
    path = Path(file)
    if path.suffix != ".npy":
        raise ValueError(f"{path}: a weight is put together in an .npy")
    if path.exists():
        raise ValueError(f"{path} is there already; give another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    kind = str(dtype).removeprefix("torch.")
    # Room for all of it at once: a map of a file that finds none kills the process.
    with file.open("wb") as made:
        os.posix_fallocate(made.fileno(), 0, 4096 + math.prod(shape) * dtype.itemsize)
    return np.lib.format.open_memmap(file, mode="w+", dtype=kind, shape=shape)


def _write_shards(value: ShardedTensor, file: Path) -> None:
    # Each rank maps the whole file, and has the pages in memory that it writes.
    out = np.load(file, mmap_mode="r+")
    for first_row, first_column, block in _blocks(value):
        rows, columns = block.shape
        out[first_row : first_row + rows, first_column : first_column + columns] = block.numpy()
    out.flush()


def _blocks(value: ShardedTensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """First row, first column and values of the parts that this rank has."""
    # A GPU's shards pass through the host block by block.
    for shard in value.local_shards():
        row, column = shard.metadata.shard_offsets
        for block in shard.tensor.detach().split(_BLOCK):
            yield row, column, block.float().cpu()
            row += len(block)
