"""At import: is the installed triple of torch, fbgemm and torchrec one that was tested?"""

from __future__ import annotations

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


def check_versions() -> None:
    """Warns in one sentence what to install if the installed triple was never tested."""
    found = tuple(installed_versions().values())
    if found not in TESTED:
        torch_, fbgemm, torchrec = TESTED[0]
        warnings.warn(
            f"cce_torchrec is tested with torch {torch_}, fbgemm-gpu {fbgemm} and torchrec "
            f"{torchrec}, not with {found}; install torch=={torch_}, then fbgemm-gpu=={fbgemm} "
            f"(fbgemm-gpu-cpu without a GPU) and torchrec=={torchrec}",
            stacklevel=3,
        )
