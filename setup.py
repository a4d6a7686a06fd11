"""What pyproject.toml has no words for: the compiled kernels, once for each level of instructions.

They are plain shared libraries, which cce_torchrec/compiled.py loads by ctypes: they call nothing
of Python, so a wheel serves all its versions, and the machine that runs one chooses the level.
"""

import os
import sysconfig
from copy import copy

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HEADERS = ["cce_torchrec/hashing.h", "cce_torchrec/lanes.h", "cce_torchrec/packing.h"]
SOURCES = {
    "kmeans": (["_native.cpp"], ["cce_torchrec/kmeans/ids.h", "cce_torchrec/kmeans/vectors.h"]),
    "lookup": (["_native.cpp", "_backward.cpp"], []),
}
"""Files of each library, and the headers that it alone reads."""
# Products and their sums are rounded once where a level has FMA: the search for the nearest takes
# less time. The lookup's kernels wait for memory, and round twice: levels have the same bits.
ROUNDING = {"kmeans": "-ffp-contract=fast", "lookup": "-ffp-contract=off"}
FLAGS = ["-O3", "-std=c++17", "-Wno-psabi", "-pthread"]
AVX2 = ["-mavx2", "-mfma"]
LEVELS = {
    "": [],
    "_avx2": AVX2,
    "_avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
"""What cce_torchrec/cpu_level.py chooses from; other processors than x86-64 have the first."""


def kernels():
    """Each library at each level that there is of the processor that is built for."""
    here = LEVELS if sysconfig.get_platform().endswith("x86_64") else {"": []}
    for folder, (files, headers) in SOURCES.items():
        for level, flags in here.items():
            yield Extension(
                f"cce_torchrec.{folder}._native{level}",
                [f"cce_torchrec/{folder}/{file}" for file in files],
                depends=[*HEADERS, *headers, "setup.py"],
                extra_compile_args=[*FLAGS, ROUNDING[folder], *flags],
                extra_link_args=["-pthread"],
                language="c++",
                optional=True,  # without a compiler torch and FBGEMM do the same
            )


class BuildKernels(build_ext):
    """Builds files whose names hold no version of Python."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext):
        # Levels have the same sources, and so have objects of the same names; threads build them.
        own = copy(self)
        own.build_temp = os.path.join(self.build_temp, ext.name)
        super(BuildKernels, own).build_extension(ext)


class TaggedWheel(bdist_wheel):
    """A wheel for one platform and every Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=list(kernels()),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": TaggedWheel},
)
