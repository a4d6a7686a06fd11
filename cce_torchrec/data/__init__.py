"""Readers of data sets for the training program and the benchmarks."""

from cce_torchrec.data.by_name import load
from cce_torchrec.data.dataset import Dataset, Rows

__all__ = ["Dataset", "Rows", "load"]
