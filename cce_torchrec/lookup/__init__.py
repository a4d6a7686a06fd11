"""From ids to pooled embeddings: expansion into codebook rows, the kernels, the output."""
