"""The compiled lookup (_lookup.cpp): an operator of torch in a library of its own.

Built when it is first used: pip installs where there is no torch to compile against. The library
needs libtorch of the version that it was built with, and neither Python nor this package: a process
that serves loads it by `torch.ops.load_library` or dlopen before what it serves.
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

import torch
from torch.utils import cpp_extension

from cce_torchrec.cpu_level import cpu_level

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent / "_lookup.cpp"
_HEADERS = [_SOURCE.parents[1] / name for name in ("hashing.h", "packing.h")]
_FLAGS = ["-O3", "-std=c++20", "-Wno-psabi", "-shared", "-fPIC"]


def library() -> Path:
    """The library with the operator `cce_inference::lookup`, built if it is not there yet.

    Raises:
        RuntimeError: it cannot be built, with the reason and the remedy.
    """
    built = _folder() / _name()
    if not built.exists():
        _build(built)
    return built


def load() -> None:
    """Has torch know the operator; see `library`.

    Raises:
        RuntimeError: it cannot, with the reason and the remedy.
    """
    why = problem()
    if why is not None:
        raise RuntimeError(why)


def available() -> bool:
    """Whether there is the library, or a compiler that can build it."""
    return problem() is None


@functools.cache
def problem() -> str | None:
    """Why torch does not know the operator: found out once, as a build takes seconds.

    Raises:
        ValueError: `CCE_CPU_LEVEL` is not one of those that this processor has.
    """
    cpu_level()  # refuses what is no level, which the library would take for the highest
    # A server may have loaded a copy, and torch takes no second one.
    if hasattr(torch.ops.cce_inference, "lookup"):
        return None
    try:
        try:
            torch.ops.load_library(library())
        except OSError:  # cut short, or of another machine
            library().unlink()
            torch.ops.load_library(library())
    except (RuntimeError, OSError) as error:
        logger.warning("lookups are portable, and slower: %s", error)
        return str(error)
    return None


def _name() -> str:
    # By what is in the sources: times of files are lost on the way into an image.
    crc = zlib.crc32(b"".join(file.read_bytes() for file in (_SOURCE, *_HEADERS)))
    return f"libcce_lookup-torch{torch.__version__}-{crc:08x}.so"


def _folder() -> Path:
    """Beside the source, or where the user keeps what is computed if nobody may write there."""
    own = _SOURCE.parent
    # An image has the library there, and a user who may only read it.
    if os.access(own, os.W_OK) or (own / _name()).exists():
        return own
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cce_torchrec"


def _build(to: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError(
            "the fused lookup is compiled when it is first used, and there is no C++ compiler; "
            "install g++, or ask for lookup='portable'"
        )
    # Those of Python are not among them: a server may be without it.
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    sources = [str(_SOURCE), *libraries, "-lc10", "-ltorch_cpu"]
    to.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own, as several processes may build at once.
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        made = Path(folder) / to.name
        command = [*shlex.split(compiler), *_FLAGS, *include, *sources, "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise RuntimeError(
                f"CXX names no compiler ({error}); unset it, or ask for lookup='portable'"
            ) from error
        if done.returncode:
            raise RuntimeError(
                f"the fused lookup does not compile: {done.stderr.strip()[:2000]}\nask for "
                "lookup='portable' to go without"
            )
        os.replace(made, to)
