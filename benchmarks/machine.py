"""The name of the device a benchmark ran on."""

from cce_torchrec.device_name import device_name

__all__ = ["device_name"]
