"""Readers of data sets for the training program and the benchmarks; even numbers of batches."""

from cce_torchrec.data.by_name import load
from cce_torchrec.data.dataset import Dataset, Rows
from cce_torchrec.data.even import even_batches

__all__ = ["Dataset", "Rows", "even_batches", "load"]
