"""Readers of data sets for the training program and the benchmarks; even numbers of batches."""

from cce_torchrec.data.by_name import load
from cce_torchrec.data.dataset import Bags, Dataset, Examples, Rows, Share
from cce_torchrec.data.even import even_batches

__all__ = ["Bags", "Dataset", "Examples", "Rows", "Share", "even_batches", "load"]
