"""At first use: is the installed triple of torch, fbgemm and torchrec tested, and does it load?"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from importlib.metadata import PackageNotFoundError, version

TESTED = [("2.13.0", "1.8.0", "1.8.0"), ("2.13.0", "1.8.0", "1.9.2"), ("2.11.0", "1.6.0", "1.6.1")]
"""The whole test suite passes with each of these; the first is the one that `run.sh` installs."""


def _installed(*names: str) -> str:
    for name in names:
        try:
            return version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    return "missing"


def installed_versions() -> dict[str, str]:
    """Versions of torch, fbgemm and torchrec, without local build tags; "missing" if absent."""
    return {
        "torch": _installed("torch"),
        "fbgemm": _installed("fbgemm-gpu-cpu", "fbgemm-gpu"),
        "torchrec": _installed("torchrec"),
    }


@functools.cache
def check_installation() -> None:
    """Looks at the versions and loads FBGEMM; see `check_versions` and `check_fbgemm`."""
    check_versions()
    check_fbgemm()


def check_versions() -> None:
    """Warns in one sentence what to install if the installed triple was never tested."""
    found = tuple(installed_versions().values())
    if found not in TESTED:
        torch_, fbgemm, torchrec = TESTED[0]
        warnings.warn(
            f"cce_torchrec is tested with torch {torch_}, fbgemm-gpu {fbgemm} and torchrec "
            f"{torchrec}, not with {found}; install torch=={torch_}, then fbgemm-gpu=={fbgemm} "
            f"(fbgemm-gpu-cpu without a GPU) and torchrec=={torchrec}",
            stacklevel=4,
        )


def check_fbgemm() -> None:
    """Loads FBGEMM's libraries before TorchRec does, whose errors do not say what to do.

    Raises:
        ImportError: in one sentence, what is missing on this machine and the remedy.
    """
    try:
        importlib.import_module("fbgemm_gpu")
    except ModuleNotFoundError:
        raise  # not installed; `check_versions` has said what to install
    except (ImportError, OSError) as error:
        raise ImportError(_unloadable(str(error) or type(error).__name__)) from error
    import torch  # installed where FBGEMM is; `check_versions` needs to run without it

    if not hasattr(torch.ops.fbgemm, "asynchronous_complete_cumsum"):  # builds that only log errors
        raise ImportError(_unloadable("it has logged why"))


def _unloadable(message: str) -> str:
    """What is missing where the loader says `message`, and the remedy."""
    found = re.search(r"lib[\w+-]+\.so[.\d]*", message)
    library = found.group() if found else ""
    if library.startswith(("libcuda.", "libnvidia-")):
        return (
            f"fbgemm-gpu, the CUDA build, needs NVIDIA's driver, and this machine lacks it (no "
            f"{library}): run where there is a GPU and its driver (a container: with --gpus all), "
            "or install the CPU build, cce-torchrec[cpu]"
        )
    torch_, fbgemm, _ = TESTED[0]
    return (
        f"FBGEMM's libraries do not load ({message.splitlines()[0]}): "
        f"install torch=={torch_} and then fbgemm-gpu=={fbgemm}, both for the same CUDA, or "
        f"fbgemm-gpu-cpu=={fbgemm} for a machine without a GPU"
    )
