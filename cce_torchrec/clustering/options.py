"""What a caller may choose about a clustering step, checked before it starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from cce_torchrec.clustering.budget import Engine
from cce_torchrec.clustering.choice import check_names, check_recipes, is_wanted
from cce_torchrec.clustering.chunk_state import ChunkState
from cce_torchrec.clustering.id_passes import IdWeights
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.gpu.usable import usable
from cce_torchrec.kmeans import lloyd
from cce_torchrec.kmeans.backends import SKLEARN_BACKENDS
from cce_torchrec.kmeans.points import metric_root

INITS = (*lloyd.INITS, "main")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How K-means runs; see the arguments of `cluster`."""

    iterations: int = 6
    backend: str = "auto"
    init: str = "random"
    tolerance: float = 0.0
    samples_per_centroid: int | None = None
    memory_limit: int | None = None
    weights: Mapping[str, torch.Tensor] | str | None = None
    metric: Mapping[str, torch.Tensor] | None = None
    finalize: bool = False
    tables: Collection[str] | None = None
    recipes: Collection[str] | None = None

    def check(self) -> None:
        """Raises ValueError if an option cannot be used."""
        check_names(self.tables)
        check_recipes(self.recipes)
        if self.init not in INITS:
            raise ValueError(f"unknown init {self.init!r}; choose one of {list(INITS)}")
        if self.finalize and self.init == "main":
            raise ValueError(
                "init 'main' has no start for the helper's rows that finalize gives to main; use "
                "'random' or 'k-means++'"
            )
        if self.iterations < 1:
            raise ValueError(f"iterations {self.iterations} must be at least 1")
        if isinstance(self.weights, str) and self.weights != "seen":
            raise ValueError(f"unknown weights {self.weights!r}; give 'seen' or a mapping")
        if self.memory_limit is not None and self.memory_limit < 1:
            raise ValueError(f"memory_limit {self.memory_limit} is below 1 byte; leave it out")
        if self.samples_per_centroid is not None and self.samples_per_centroid < 1:
            raise ValueError(f"samples_per_centroid {self.samples_per_centroid} is below 1")

    def fingerprint(self) -> tuple[object, ...]:
        """What every rank of a step must have chosen alike."""
        # Tensors are not compared here: replicas.digests has those of tables that have copies.
        seen = self.weights if isinstance(self.weights, str) else None
        return (
            self.iterations,
            self.backend,
            self.init,
            self.tolerance,
            self.samples_per_centroid,
            self.memory_limit,
            seen,
            self.finalize,
            None if self.tables is None else tuple(sorted(self.tables)),
            None if self.recipes is None else tuple(sorted(self.recipes)),
        )

    def wants(self, path: str, config: CCEEmbeddingBagConfig) -> bool:
        """Whether the table of `config` at `path` is one of those that are clustered."""
        return is_wanted(path, self.tables) and (
            self.recipes is None or config.recipe in self.recipes
        )

    def check_names(self, tables: set[str]) -> None:
        """Raises ValueError if weights or a metric are given for a table that does not cluster."""
        for argument in ("weights", "metric"):
            given = getattr(self, argument)
            unknown = sorted(set(given) - tables) if isinstance(given, Mapping) else []
            if unknown:
                raise ValueError(
                    f"{argument} for {unknown}, which do not cluster; those that do are "
                    f"{sorted(tables)}"
                )

    @property
    def scorer(self) -> str:
        """The backend that scores: scikit-learn's leave that to ours."""
        return "auto" if self.backend in SKLEARN_BACKENDS else self.backend

    def engine(self, device: torch.device) -> Engine:
        """What the memory of a step depends on."""
        weighted = self.weights is not None
        triton = device.type == "cuda" and usable(device)
        return Engine(
            backend=self.backend,
            init=self.init,
            weighted=weighted,
            metric=self.metric is not None,
            device=device.type,
            triton=triton,
        )

    def weights_of(self, state: ChunkState) -> IdWeights | None:
        """Weights of a table's ids, or None for one each.

        Raises:
            ValueError: weights that are not N integers, at least 0; "seen" without `track_seen`.
        """
        config = state.codes.config
        if isinstance(self.weights, str):
            if state.codes.seen is None:
                raise ValueError(f"{state.name}: weights='seen' needs a table with track_seen=True")
            return IdWeights(state.codes.seen, bits=True, base=state.codes.ids.start)
        if self.weights is None or config.name not in self.weights:
            return None
        weights = self.weights[config.name]
        if weights.shape != (config.num_embeddings,) or weights.is_floating_point():
            raise ValueError(
                f"table {config.name!r}: weights must be integers [{config.num_embeddings}], one "
                f"per id; got {weights.dtype} {tuple(weights.shape)}"
            )
        if int(weights.min()) < 0:
            raise ValueError(f"table {config.name!r}: a weight of {int(weights.min())} is negative")
        return IdWeights(weights.to(state.weight.device), bits=False)

    def metric_of(self, name: str, chunk: int, dim: int) -> torch.Tensor | None:
        """The metric [s, s] of a chunk of table `name`, or None for the Euclidean one."""
        if self.metric is None or name not in self.metric:
            return None
        metric = self.metric[name]
        if metric.dim() != 3 or metric.shape[1:] != (dim, dim) or not 0 <= chunk < len(metric):
            raise ValueError(
                f"table {name!r}: metric must be [num_chunks, {dim}, {dim}]; got "
                f"{tuple(metric.shape)}"
            )
        return metric[chunk]

    def check_for(self, state: ChunkState) -> None:
        """Raises ValueError if an option does not suit a chunk, or its weights are not finite."""
        state.check()
        self.check_arguments(state)

    def check_arguments(self, state: ChunkState) -> None:
        """Raises ValueError if an option does not suit a chunk, whatever its weights are."""
        config = state.codes.config
        if self.weights is not None and state.column == 0:  # once a table: they are as long as it
            self.weights_of(state)
        metric = self.metric_of(config.name, state.chunk, config.chunk_dim)
        if metric is not None:
            metric_root(metric, config.chunk_dim)
