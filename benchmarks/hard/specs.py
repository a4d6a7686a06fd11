"""Random tables and batches, small enough to be drawn by hypothesis and sent to other processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torchrec
from hypothesis import strategies as st
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig

FEATURES = ["f", "g", "h"]
# A gradient that cancels to rounding must not become a step of the size of the rate.
EPS = 1e-3
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.125}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.125, "eps": EPS}),
    "RowWiseAdagrad": (torchrec.optim.RowWiseAdagrad, {"lr": 0.125, "eps": EPS}),
    "Adam": (torch.optim.Adam, {"lr": 0.0625, "eps": EPS}),
}


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One table; `chunks` 0 is a plain one."""

    name: str
    ids: int
    features: tuple[str, ...]
    mean: bool
    width: int
    """Of a chunk, or of a plain table."""
    chunks: int = 0
    rows: int = 1
    helper: int = 0
    learned: bool = True
    recipe: str = "frequent"
    counted: bool = False
    seen: bool = False
    hashed: bool = False
    joint: bool = False
    """Whether each feature has ids of its own."""
    rotated: bool = False
    """Whether each of them begins with another chunk."""
    seed: int = 0
    frozen: bool = False
    """Whether its parameters require no gradient from the start."""

    @property
    def ranges(self) -> dict[str, range]:
        """The ids of each feature."""
        if not self.joint:
            return {feature: range(self.ids) for feature in self.features}
        cuts = [self.ids * i // len(self.features) for i in range(len(self.features) + 1)]
        return {f: range(*cuts[i : i + 2]) for i, f in enumerate(self.features)}

    def config(self) -> EmbeddingBagConfig:
        """What the package is given."""
        fields = {
            "name": self.name,
            "num_embeddings": self.ids,
            "embedding_dim": self.width * max(1, self.chunks),
            "feature_names": list(self.features),
            "pooling": PoolingType.MEAN if self.mean else PoolingType.SUM,
        }
        if not self.chunks:
            return EmbeddingBagConfig(**fields)
        return CCEEmbeddingBagConfig(
            **fields,
            num_chunks=self.chunks,
            num_rows=self.rows,
            num_helper_rows=self.helper,
            learned_codes=self.learned,
            recipe=self.recipe,
            track_counts=self.counted or None,
            track_seen=self.seen,
            hash_ids=self.hashed,
            id_ranges=self.ranges if self.joint else None,
            rotate_chunks=self.rotated,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A collection and how it is trained."""

    tables: tuple[TableSpec, ...]
    optimizer: str = "SGD"
    weighted: bool = False
    in_backward: bool = True
    """Whether the backward pass steps the tables; always so where they are sharded."""
    mode: str = "WARNING"
    seed: int = 0

    @property
    def features(self) -> list[str]:
        """Those that a table reads."""
        return [f for f in FEATURES if any(f in table.features for table in self.tables)]

    def slots(self) -> list[tuple[TableSpec, str]]:
        """Table and feature of each part of the output, in its order."""
        return [(table, feature) for table in self.tables for feature in table.features]

    def model(self) -> Model:
        """The unsharded model, with its optimizer in the backward pass if it has that."""
        torch.manual_seed(self.seed)
        out = Model(self)
        if self.in_backward:
            kind, settings = OPTIMIZERS[self.optimizer]
            apply_optimizer_in_backward(kind, list(out.parameters()), dict(settings))
        frozen = {table.name for table in self.tables if table.frozen}
        for name, bag in out.collection.embedding_bags.items():
            if name.split("#")[0] in frozen:
                bag.weight.requires_grad_(False)
        return out


class Model(nn.Module):
    """A collection alone."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        mode = type(CCEEmbeddingBagCollection([]).bounds_check_mode)[spec.mode]
        self.collection = CCEEmbeddingBagCollection(
            [table.config() for table in spec.tables],
            is_weighted=spec.weighted,
            bounds_check_mode=mode,
        )

    def forward(self, features: KeyedJaggedTensor) -> torchrec.KeyedTensor:
        """Pooled embeddings."""
        return self.collection(features)


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """Bags of every feature, made of a seed."""

    seed: int
    bags: int
    outside: bool
    """Whether some ids are out of bounds."""

    def bags_of(self, spec: ModelSpec) -> dict[str, list[list[tuple[int, float]]]]:
        """Per feature its bags of (id, weight)."""
        g = torch.Generator().manual_seed(self.seed)

        def draw(high: int) -> int:
            return int(torch.randint(0, high, (), generator=g))

        out: dict[str, list[list[tuple[int, float]]]] = {}
        for feature in spec.features:
            readers = [table for table in spec.tables if feature in table.features]
            most = max(len(table.ranges[feature]) for table in readers)
            least = min(len(table.ranges[feature]) for table in readers)
            raw = all(table.hashed for table in readers)
            out[feature] = bags = []
            for _ in range(self.bags):
                bag = []
                for _ in range(draw(4)):
                    id_ = draw(2**40) - 2**39 if raw else draw(least)
                    if self.outside and draw(4) == 0:
                        id_ = [-1, most, most + 5, -(2**40), 2**40, 2**31][draw(6)]
                    bag.append((id_, (draw(16) - 6) / 4 if spec.weighted else 1.0))
                bags.append(bag)
        return out

    def tensors(self, spec: ModelSpec) -> KeyedJaggedTensor:
        """What the collection is called with; its keys are in an order of their own."""
        bags = self.bags_of(spec)
        keys = [*reversed(spec.features), "unused"]
        bags["unused"] = [[(7, 1.0)]] * self.bags
        flat = [pair for key in keys for bag in bags[key] for pair in bag]
        return KeyedJaggedTensor(
            keys=keys,
            values=torch.tensor([id_ for id_, _ in flat], dtype=torch.int64),
            lengths=torch.tensor([len(bag) for key in keys for bag in bags[key]]),
            weights=torch.tensor([w for _, w in flat]) if spec.weighted else None,
            stride=self.bags,
        )

    def coefficients(self, width: int) -> torch.Tensor:
        """Gradient of the output, [bags, width]: eighths, so that sums of them are exact."""
        g = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(-16, 17, (self.bags, width), generator=g) / 8.0


SEEDS = st.integers(0, 2**31 - 2)
BATCHES = st.builds(BatchSpec, seed=SEEDS, bags=st.integers(1, 4), outside=st.booleans())


@st.composite
def table_specs(draw: st.DrawFn, name: str) -> TableSpec:
    """Any kind of table."""
    features = tuple(draw(st.lists(st.sampled_from(FEATURES), min_size=1, max_size=3, unique=True)))
    common = {
        "name": name,
        "ids": draw(st.integers(3, 40)),
        "features": features,
        "mean": draw(st.booleans()),
        "width": draw(st.sampled_from([4, 8])),
        "frozen": draw(st.integers(0, 7)) == 0,
    }
    if draw(st.integers(0, 3)) == 0:
        return TableSpec(**common)
    learned = draw(st.integers(0, 4)) > 0
    helper = draw(st.sampled_from([0, 1, 3, 9, 20]))
    recipe = draw(st.sampled_from(["frequent", "frequent", "rare"]))
    joint = len(features) > 1 and draw(st.booleans())
    return TableSpec(
        **common,
        chunks=draw(st.integers(1, 4)),
        rows=draw(st.sampled_from([1, 2, 3, 5, 16, 17, 70, 300])),
        helper=helper,
        learned=learned,
        recipe=recipe if learned else "frequent",
        counted=learned and draw(st.integers(0, 3)) == 0,
        seen=draw(st.booleans()),
        hashed=draw(st.integers(0, 3)) == 0,
        joint=joint,
        rotated=joint and draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


@st.composite
def model_specs(draw: st.DrawFn) -> ModelSpec:
    """One to four tables, of which at least one is trained."""
    tables = [draw(table_specs(f"t{i}")) for i in range(draw(st.integers(1, 4)))]
    if all(table.frozen for table in tables):
        tables[0] = TableSpec(**{**vars(tables[0]), "frozen": False})
    return ModelSpec(
        tables=tuple(tables),
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        weighted=draw(st.booleans()),
        in_backward=draw(st.integers(0, 3)) > 0,
        mode=draw(st.sampled_from(["WARNING", "IGNORE"])),
        seed=draw(SEEDS),
    )


@dataclass(kw_only=True)
class State:
    """All that a model keeps, of all ranks together, as plain tensors."""

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Per chunk ("table#chunk") or plain table [rows, width]."""
    optimizer: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    codes: dict[str, torch.Tensor] = field(default_factory=dict)
    """Main rows of all ids, int64 [N, c]; hashed ones too."""
    clusterings: dict[str, int] = field(default_factory=dict)
    finalized: set[str] = field(default_factory=set)
    seen: dict[str, torch.Tensor] = field(default_factory=dict)
    """Bits [N]."""
    levels: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of the counts of ids [N]."""
    batches: dict[str, int] = field(default_factory=dict)
