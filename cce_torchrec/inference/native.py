"""The compiled lookup (_lookup.cpp): an operator of torch in a library of its own.

Built when it is first used: pip installs where there is no torch to compile against. The library
needs libtorch of the version that it was built with, and neither Python nor this package: a process
that serves loads it by `torch.ops.load_library` or dlopen before what it serves.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

_SOURCE = Path(__file__).parent / "_lookup.cpp"
_HEADERS = [_SOURCE.parents[1] / name for name in ("hashing.h", "packing.h")]
_FLAGS = ["-O3", "-std=c++20", "-Wno-psabi", "-shared", "-fPIC"]


def library() -> Path:
    """The library with the operator `cce_inference::lookup`, built if it is not there yet.

    Raises:
        RuntimeError: it cannot be built, with the reason and the remedy.
    """
    name = f"libcce_lookup-torch{torch.__version__}.so"
    built = _folder() / name
    # A library that is older than its source would be of another version.
    newest = max(file.stat().st_mtime for file in (_SOURCE, *_HEADERS))
    if not built.exists() or built.stat().st_mtime < newest:
        _build(built)
    return built


@functools.cache
def load() -> None:
    """Has torch know the operator; see `library`."""
    torch.ops.load_library(library())


def available() -> bool:
    """Whether there is the library, or a compiler that can build it."""
    try:
        load()
    except (RuntimeError, OSError):
        return False
    return True


def _folder() -> Path:
    """Beside the source, or where the user keeps what is computed if nobody may write there."""
    own = _SOURCE.parent
    if os.access(own, os.W_OK):
        return own
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cce_torchrec"


def _build(to: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError(
            "the fused lookup is compiled when it is first used, and there is no C++ compiler; "
            "install g++, or ask for lookup='portable'"
        )
    to.parent.mkdir(parents=True, exist_ok=True)
    # Those of Python are not among them: a server may be without it.
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    # Under a name of its own, as several processes may build at once.
    handle, made = tempfile.mkstemp(dir=to.parent, suffix=".so")
    os.close(handle)
    command = [compiler, *_FLAGS, *include, str(_SOURCE), *libraries, "-lc10", "-ltorch_cpu"]
    done = subprocess.run([*command, "-o", made], capture_output=True, text=True, check=False)
    if done.returncode:
        os.remove(made)
        raise RuntimeError(
            f"the fused lookup does not compile: {done.stderr.strip()[:2000]}\nask for "
            "lookup='portable' to go without"
        )
    os.chmod(made, 0o755)
    os.replace(made, to)
