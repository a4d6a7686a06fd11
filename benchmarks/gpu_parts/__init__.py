"""The parts of benchmarks.gpu; each module has `run(part)` and goes through __main__.py alone."""
