"""Exact, deterministic K-means over tensors or the pairs of a CCE chunk, on any number of ranks."""

from cce_torchrec.kmeans.lloyd import IterationStats, KMeansResult, kmeans
from cce_torchrec.kmeans.points import PairPoints, Points, TensorPoints

__all__ = ["IterationStats", "KMeansResult", "PairPoints", "Points", "TensorPoints", "kmeans"]
