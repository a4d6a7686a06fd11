"""What a checkpoint says of itself: manifest.json, as objects."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

from cce_torchrec.clustering.schedule import ClusteringSchedule

T = TypeVar("T")

FORMAT = 4
READABLE = (2, 3, FORMAT)
"""Format 3 has whole codes instead of packed ones; format 2 as well, and tensors as
torch.distributed.checkpoint writes them."""


# A tuple, which JSON has as a list: [size, crc].
class Fingerprint(NamedTuple):
    """What a file was when it was written."""

    size: int
    """Bytes."""
    crc: int
    """CRC-32 of its content."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a model reads a table: what an export has to know, and a load does not compare."""

    features: list[str]
    pooling: str
    """SUM or MEAN, or NONE of sequences."""
    weighted: bool
    """Whether bags are pooled by weights of their ids."""


@dataclass(frozen=True, kw_only=True)
class TableRecord:
    """A table of a collection, plain in this form; what a load compares, and how it is read."""

    kind: ClassVar[str] = "plain"
    collection: str
    """Path of the collection in the model, "" of the model itself."""
    name: str
    num_embeddings: int
    embedding_dim: int
    reading: Reading | None = field(default=None, compare=False)
    """None in older manifests."""

    @property
    def full_name(self) -> str:
        """`collection.table`, by which manifests and reports name it."""
        return f"{self.collection}.{self.name}" if self.collection else self.name

    def to_json(self) -> dict[str, Any]:
        """The record as JSON has it."""
        found = {key: value for key, value in asdict(self).items() if value or key != "reading"}
        # The order of format 2, in which the kind stands between the place and the shape.
        place = {"collection": found.pop("collection"), "name": found.pop("name")}
        return place | {"kind": self.kind} | found


@dataclass(frozen=True, kw_only=True)
class CCETableRecord(TableRecord):
    """A compressed table."""

    kind: ClassVar[str] = "CCE"
    num_chunks: int
    num_rows: int
    num_helper_rows: int
    seed: int
    learned_codes: bool
    track_seen: bool
    hash_ids: bool
    track_counts: bool = False
    id_ranges: dict[str, list[int]] | None = None
    """Where the ids of each feature start and end; None where all features read the same ids."""
    rotate_chunks: bool = False

    def to_json(self) -> dict[str, Any]:
        """The record as JSON has it, where what older manifests lack is left out if empty."""
        added = ("track_counts", "id_ranges", "rotate_chunks")
        return {key: value for key, value in super().to_json().items() if value or key not in added}


_TABLES = {record.kind: record for record in (TableRecord, CCETableRecord)}


@dataclass(frozen=True, kw_only=True)
class OptimizerRecord:
    """The optimizer of one parameter."""

    kind: str
    """Name of its class in torch or TorchRec, FBGEMM's name of others."""
    settings: dict[str, Any]
    """Of its parameter group, such as lr and amsgrad."""
    state: dict[str, list[int]]
    """Shape of each state tensor, by torch's name of it."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """Types of the state tensors that are not float32, by torch's names of both."""
    values: dict[str, Any] = field(default_factory=dict)
    """State that is no tensor."""
    unsaved_state: list[str] = field(default_factory=list)
    """What of the state is not in the checkpoint, as neither tensors nor JSON can hold it."""
    unsaved_settings: list[str] = field(default_factory=list)
    """The same of the group."""

    def __post_init__(self) -> None:
        for name in ("settings", "state", "dtypes", "values"):
            if not isinstance(getattr(self, name), dict):  # found before a load has written
                raise TypeError(f"{name} of an optimizer is no dictionary")

    def to_json(self) -> dict[str, Any]:
        """The record as JSON has it; what older manifests lack is left out where it is empty."""
        added = ("dtypes", "values", "unsaved_state", "unsaved_settings")
        return {key: value for key, value in asdict(self).items() if value or key not in added}


# Beside a parameter that has no optimizer, so that a load compares two records and never a None.
NO_OPTIMIZER = OptimizerRecord(kind="no optimizer", settings={}, state={})


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole checkpoint."""

    step: int
    """Optimizer steps so far."""
    world_size: int
    """Ranks that saved it."""
    tables: dict[str, TableRecord]
    """By `collection.table`."""
    optimizers: dict[str, OptimizerRecord]
    """By the name of the parameter."""
    schedule: ClusteringSchedule | None
    extra: dict[str, Any] | None
    """What the caller of `save_checkpoint` gave."""
    versions: dict[str, Any]
    """Of torch, FBGEMM and TorchRec."""
    files: dict[str, Fingerprint]
    """All that belong to the checkpoint but the manifest, by name."""
    format: int = FORMAT

    @property
    def is_format_2(self) -> bool:
        """Whether tensors are as torch.distributed.checkpoint writes them."""
        return self.format == 2

    @property
    def has_whole_codes(self) -> bool:
        """Whether codes are whole integers [N, c]; packed otherwise."""
        return self.format < 4

    @property
    def total_bytes(self) -> int:
        """Of the checkpoint's files."""
        return sum(Fingerprint(*one).size for one in self.files.values())

    @property
    def summary(self) -> str:
        """What the checkpoint has, in numbers, as the log has it."""
        return f"step {self.step}, {len(self.tables)} tables, {self.total_bytes:,} bytes"

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON has it."""
        schedule = self.schedule
        return {
            "format": self.format,
            "step": self.step,
            "world_size": self.world_size,
            "tables": {name: table.to_json() for name, table in self.tables.items()},
            "optimizers": {name: one.to_json() for name, one in self.optimizers.items()},
            # JSON has no sets, and a set has no order.
            "schedule": None
            if schedule is None
            else {"steps": sorted(schedule.steps), "interval": schedule.interval}
            # Which older manifests lack.
            | ({"final": schedule.final} if schedule.final else {})
            | ({} if schedule.rare is None else {"rare": sorted(schedule.rare)}),
            "extra": self.extra,
            "versions": self.versions,
            "files": self.files,
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Manifest:
        """What `to_json` gave.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: something is missing, of another type,
                or the name of a file is a path.
        """
        for name in found["files"]:
            # Whoever wrote the manifest would else have files read from anywhere.
            if not re.fullmatch(r"\.?\w[\w.-]*", name):
                raise ValueError(f"the file {name!r} is not one of the checkpoint's folder")
        tables, schedule = found["tables"], found["schedule"]
        return cls(
            step=int(found["step"]),
            world_size=int(found["world_size"]),
            tables={name: _table(one) for name, one in tables.items()},
            optimizers={k: _known(OptimizerRecord, one) for k, one in found["optimizers"].items()},
            schedule=None
            if schedule is None
            else ClusteringSchedule(
                frozenset(schedule["steps"]),
                schedule["interval"],
                schedule.get("final", 0),
                frozenset(schedule["rare"]) if "rare" in schedule else None,
            ),
            extra=found["extra"],
            versions=found["versions"],
            files={name: Fingerprint(*one) for name, one in found["files"].items()},
            format=found["format"],
        )


def _table(found: dict[str, Any]) -> TableRecord:
    reading = found.get("reading")
    read = None if reading is None else _known(Reading, reading)
    return _known(_TABLES[found["kind"]], found | {"reading": read})


def _known(record: type[T], found: dict[str, Any]) -> T:
    """A `record` of the fields that it has; what a later version may add is left out."""
    names = [one.name for one in fields(record) if one.name in found]  # type: ignore[arg-type]  # a dataclass
    return record(**{name: found[name] for name in names})
