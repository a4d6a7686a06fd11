"""Checkpoints of format 2, whose tensors torch.distributed.checkpoint wrote with pickles.

A pickle names what it is made of, and may name any function. These are read by names of a list.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from cce_torchrec.checkpoint.manifest import Fingerprint
from cce_torchrec.checkpoint.renamed import with_names

INDEX = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_BUILT = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}
"""All that the metadata of a checkpoint is made of, beside torch's dtypes."""


class _Unpickler(pickle.Unpickler):
    """Builds what metadata is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle names.

        Raises:
            UnpicklingError: it is none of metadata.
        """
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _BUILT:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of metadata")


class Format2Plans(DefaultLoadPlanner):
    """torch's plans of a flat state dict, of which objects are read by torch's safe unpickler."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts an object into the state dict."""
        found = torch.load(value, weights_only=True)
        self.original_state_dict[read_item.dest_index.fqn] = found


class Format2Reader(FileSystemReader):
    """torch's reader, which builds named types alone and opens the manifest's files alone.

    Args:
        checkpoint: its folder.
        files: those that the manifest names.
        weights: what the model calls weights that have another name in the checkpoint.
    """

    def __init__(
        self, checkpoint: Path, files: dict[str, Fingerprint], weights: dict[str, str]
    ) -> None:
        super().__init__(checkpoint)
        # torch makes a local path of that of an object store.
        self.path = self._checkpoint = checkpoint
        self._files, self._weights = files, weights

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata of the checkpoint.

        Raises:
            ValueError: it is damaged, or names what metadata is not made of.
        """
        file = self._checkpoint / INDEX
        try:
            if INDEX not in self._files:
                raise ValueError(f"the manifest has no file {INDEX!r}")
            metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
            for one in metadata.storage_data.values():
                if one.relative_path not in self._files:
                    raise ValueError(f"the manifest has no file {one.relative_path!r}")
        except Exception as error:  # a damaged pickle raises whatever comes
            raise ValueError(f"{file} is damaged ({error}); load another checkpoint") from error
        return with_names(metadata, self._weights)
