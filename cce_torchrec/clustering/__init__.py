"""The clustering step: relearn codes, codebooks and hashes of all CCE tables of a model."""

from cce_torchrec.clustering.finalize import finalize
from cce_torchrec.clustering.schedule import ClusteringSchedule
from cce_torchrec.clustering.step import ChunkReport, ClusteringReport, cluster

__all__ = ["ChunkReport", "ClusteringReport", "ClusteringSchedule", "cluster", "finalize"]
