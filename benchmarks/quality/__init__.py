"""One fair benchmark of every method: `python -m benchmarks.quality`; benchmarks/README.md."""
