"""A folder that serving loads tables from, without what trained them.

folder/
    manifest.json   what is in it: tables, features, versions, sizes and checksums, golden rows
    codes.bin       packed codes of all tables
    rows.bin        codebook rows of all tables

Both files are read as they are, so that processes which map them share one copy of their memory.
Whoever writes gives the folder its name last: one that has it is whole.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cce_torchrec.bars import in_blocks
from cce_torchrec.checkpoint.location import (
    fingerprint,
    location,
    store_of,
    sync_folder,
    write,
)
from cce_torchrec.checkpoint.whole_file import folder_beside
from cce_torchrec.inference.collection import (
    InferenceEmbeddingBagCollection,
    InferenceEmbeddingCollection,
    collection_of,
    lookup_type,
)
from cce_torchrec.inference.packed_tables import PackedFeature, PackedTable, PackedTables
from cce_torchrec.inference.row_types import row_type
from cce_torchrec.signed import is_as_written, shown, signed
from cce_torchrec.spans import span
from cce_torchrec.versions import installed_versions

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, CODES, ROWS = "manifest.json", "codes.bin", "rows.bin"
_GOLDEN_IDS = 4
"""Of each feature."""
_TOLERANCE = 1e-5
"""Of golden rows, in parts of the largest: machines round in other places."""

Served = InferenceEmbeddingBagCollection | InferenceEmbeddingCollection


def save_inference(collection: Served, folder: str | Path) -> Path:
    """Writes what `load_inference` reads, and returns the folder.

    Raises:
        ValueError: `folder` is there already, or cannot be written; nothing is left half-written.
    """
    # Never over another: processes may have its files mapped.
    if not hasattr(collection, "packed"):
        raise ValueError(
            f"{type(collection).__name__} is no inference collection; save those of a model one by "
            "one, each made by inference_collection"
        )
    folder = location(folder)
    if store_of(folder) is not None:
        raise ValueError(f"{folder}: exports are mapped, so give a local folder, and upload that")
    if folder.exists():
        raise ValueError(f"{folder} is there already; give another folder, or remove it")
    with folder_beside(folder) as writing:
        packed = collection.packed
        parts = {CODES: packed.codes.numpy(), ROWS: packed.rows.numpy()}
        with span("export, write"):
            files = {
                name: write(writing / name, in_blocks([part], part.nbytes, f"writing {name}"))
                for name, part in parts.items()
            }
        described = _described(collection) | {
            "files": {name: {"bytes": own.size, "crc32": own.crc} for name, own in files.items()}
        }
        write(writing / MANIFEST, [json.dumps(signed(described), indent=1).encode()])
        os.chmod(writing, 0o755)  # mkdtemp's are for their owner alone
        writing.rename(folder)
        sync_folder(folder.parent)
    return folder


def load_inference(
    folder: str | Path, *, lookup: str = "auto", mmap: bool = True, check: bool = True
) -> Served:
    """The collection that `save_inference` wrote into `folder`.

    Args:
        lookup: see `inference_collection`; another one than that of the writer gives equal results.
        mmap: map the files, so that processes share their memory and start at once; they must stay
            where they are. Otherwise they are read.
        check: compare checksums, which reads the files once, and golden rows, on the CPU. Without
            it, codes that are damaged may read other memory than rows.

    Raises:
        ValueError: no such folder, one that is still being written or of another format, or a file
            that is missing, cut short or damaged. One that other versions of torch, FBGEMM or
            TorchRec wrote is logged where golden rows can tell whether it is right, and refused
            without `check`.
        RuntimeError: see `inference_collection`.
    """
    if "://" in str(folder):
        raise ValueError(f"{folder}: exports are mapped; download it, and give that folder")
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that save_inference wrote")
    found = _manifest(folder, check)
    lookup_type(lookup)  # whose errors are not of the folder
    try:
        for name in (CODES, ROWS):
            _check_file(folder / name, found["files"][name], check)
        packed = _packed(found, *(_tensor(folder / name, mmap) for name in (CODES, ROWS)))
        options = {name: found[name] for name in ("ignores", "sequences", "need_indices")}
        golden = found["golden"]
        collection = collection_of(packed, lookup=lookup, **options)
        # The sums of what was mapped may be right, and the machine or a version not.
        if check:
            _check_golden(folder, packed, golden, lookup)
    except ValueError:
        raise
    except Exception as error:  # by hand, or by an unfinished version: whatever it leads to
        raise ValueError(
            f"{folder / MANIFEST} does not describe tables ({shown(error, 300)}); write the "
            "export again"
        ) from error
    return collection


def _described(collection: Served) -> dict[str, Any]:
    packed = collection.packed
    return {
        "format": FORMAT,
        "versions": installed_versions(),
        "sequences": isinstance(collection, InferenceEmbeddingCollection),
        "need_indices": getattr(collection, "need_indices", False),
        "ignores": collection.ignores,
        "is_weighted": packed.is_weighted,
        "tables": [asdict(t) | {"row_type": t.row_type.name} for t in packed.tables],
        "features": [_feature(feature) for feature in packed.features],
        "golden": _golden(collection),
    }


def _feature(feature: PackedFeature) -> dict[str, Any]:
    out = asdict(feature) | {"ids": [feature.ids.start, feature.ids.stop]}
    # Left out where it says nothing, so that versions before it read the export.
    return {name: value for name, value in out.items() if value or name != "first_chunk"}


def _golden(collection: Served) -> list[dict[str, Any]]:
    """Some ids of each feature, and what they are looked up as."""
    packed = collection.packed
    out = []
    for number, feature in enumerate(packed.features):
        count = len(feature.ids)
        ids = [i * (count - 1) // (_GOLDEN_IDS - 1) for i in range(_GOLDEN_IDS)]
        vectors = _vectors(packed, number, ids, "portable")
        out.append({"key": feature.key, "ids": ids, "vectors": vectors.tolist()})
    return out


def _vectors(packed: PackedTables, number: int, ids: list[int], lookup: str) -> torch.Tensor:
    """Of a feature the vectors of `ids` each by itself, and of all in one bag, [ids + 1, D]."""
    # Golden rows tell of the files, and the tables are not on a GPU yet.
    kind = lookup_type("auto" if lookup == "triton" else lookup)
    own = kind(packed.only(number, is_weighted=packed.is_weighted))
    # By unequal weights, so that a pooling that is not the table's is seen.
    weights = torch.arange(1.0, 1 + 2 * len(ids)) if packed.is_weighted else None
    lengths = torch.tensor([1] * len(ids) + [len(ids)])
    return own(torch.tensor(ids * 2), lengths, weights)


def _manifest(folder: Path, check: bool) -> dict[str, Any]:
    """What the manifest says.

    Raises:
        ValueError: there is none that this version reads.
    """
    file = folder / MANIFEST
    try:
        if file.exists() and not file.is_file():  # to read a pipe would not end
            raise OSError("it is no file")
        found = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has no {MANIFEST}: it is no export, or is still being written"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # the last of lists in lists
        raise ValueError(f"{file} cannot be read ({error}); write the export again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        format_ = found.get("format") if isinstance(found, dict) else None
        raise ValueError(
            f"{file} has format {shown(format_)}; this version reads {FORMAT}: install the version "
            "of cce_torchrec that wrote it, or write the export again"
        )
    if not is_as_written(found, needed=True):  # as others may be right by chance, and read amiss
        raise ValueError(f"{file} is damaged (its checksum differs); copy the whole export again")
    versions = found.get("versions")
    if versions != installed_versions():
        differ = f"{folder} was written with {versions}, and is read with {installed_versions()}"
        if not check:
            raise ValueError(
                f"{differ}: load it with check=True, so that golden rows tell whether it is right, "
                "or write it again with the versions that are installed here"
            )
        logger.warning("%s: what golden rows say counts", differ)
    return found


def _check_file(file: Path, expected: dict[str, int], checksums: bool) -> None:
    """Compares a file with what the manifest says of it.

    Raises:
        ValueError: it is missing, cut short, or damaged.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing; copy the whole export again")
    if not os.access(file, os.R_OK):
        raise ValueError(f"{file} cannot be read; see to its permissions")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(
            f"{file} has {size} bytes, its manifest says {expected['bytes']}; copy the whole "
            "export again"
        )
    if checksums and fingerprint(file).crc != expected["crc32"]:
        raise ValueError(f"{file} is damaged (its checksum differs); copy the whole export again")


def _tensor(file: Path, mmap: bool) -> torch.Tensor:
    """The bytes of a file, uint8."""
    size = file.stat().st_size
    if not size:  # which no system maps
        return torch.empty(0, dtype=torch.uint8)
    # Private to the process as soon as it writes there, which lookups never do.
    mapped = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    return mapped if mmap else mapped.clone()


def _packed(found: dict[str, Any], codes: torch.Tensor, rows: torch.Tensor) -> PackedTables:
    tables = [
        PackedTable(
            **own
            | {
                "row_type": row_type(own["row_type"]),
                "hashes": tuple(tuple(chunk) for chunk in own["hashes"]),
            }
        )
        for own in found["tables"]
    ]
    features = [PackedFeature(**own | {"ids": range(*own["ids"])}) for own in found["features"]]
    return PackedTables(
        tables=tables,
        features=features,
        codes=codes,
        rows=rows,
        is_weighted=found["is_weighted"],
    )


def _check_golden(
    folder: Path, packed: PackedTables, golden: list[dict[str, Any]], lookup: str
) -> None:
    """Looks golden rows up.

    Raises:
        ValueError: they are others than when the export was written.
    """
    # One by one, so that the message names the feature.
    for number, own in enumerate(golden):
        expected = torch.tensor(own["vectors"])
        found = _vectors(packed, number, own["ids"], lookup)
        off = float((found - expected).abs().amax())
        # Not a number is not within any tolerance.
        if not off <= _TOLERANCE * max(1e-30, float(expected.abs().amax())):
            raise ValueError(
                f"{folder}: feature {own['key']!r} of ids {own['ids']} is off by {off:.2g} from "
                "what it was when the export was written; write it again with the versions that "
                "are installed here"
            )
