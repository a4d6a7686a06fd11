"""Sharded modules and their sharders."""

from cce_torchrec.versions import check_installation

check_installation()  # before TorchRec is loaded, whose errors do not say what to do
