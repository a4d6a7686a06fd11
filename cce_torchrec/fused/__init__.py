"""Expansion of ids into codebook rows in one pass: compiled for CPUs, in Triton for CUDA."""
