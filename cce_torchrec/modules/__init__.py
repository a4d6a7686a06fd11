"""Unsharded modules."""

from cce_torchrec.versions import check_installation

check_installation()  # before TorchRec is loaded, whose errors do not say what to do

# Registers what refuses CCE collections inside TorchRec's managed-collision modules.
from cce_torchrec.modules import managed_collision  # noqa: E402, F401
