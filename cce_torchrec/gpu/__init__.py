"""What the package needs to know of a GPU: whether kernels run on it, and its memory."""
