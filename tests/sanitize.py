"""`python -m tests.sanitize`: tests of the compiled kernels under two sanitizers of g++.

AddressSanitizer finds reads and writes beyond what was allocated, UndefinedBehaviorSanitizer what
C++ does not define: sums that overflow, shifts that are too far, pointers that are not aligned. The
kernels are built with both in a copy of the clone, and each finding ends the test that made it.
First a library that reads one value too many must be found, or nothing else would be.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from cce_torchrec.cpu_level import LEVELS, highest_level
from tests.support.clone import ROOT, copy_clone

FOLDER = ROOT / "build" / "sanitize"
FLAGS = "-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
KERNELS = [
    "expand", "bags", "backward", "kmeans", "operators", "packing", "hashing", "id_ranges", "rare",
    "clustering", "plus_plus", "exact_sums", "cpu_levels",
]  # fmt: skip
INFERENCE = ["inference", "inference_sizes", "inference_vectors"]
"""Of the lookup for serving; it has two forms, and its tests start processes of both."""
CONTROL = """
#include <cstdint>
extern "C" int64_t read_at(const int64_t *values, int64_t at) { return values[at]; }
"""
READ = """
import ctypes, sys, torch
values = torch.ones(5, dtype=torch.int64)
read = ctypes.CDLL(sys.argv[1]).read_at
read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
print("read", read(values.data_ptr(), int(sys.argv[2])))
"""


def runtime():
    """The sanitizers' libraries, which have to be there before Python allocates."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        command = ["g++", f"-print-file-name={name}"]
        file = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(file).is_absolute():  # g++ repeats the name of what it does not have
            raise SystemExit(f"g++ has no {name}; install the sanitizers of GCC")
        found.append(file)
    return ":".join(found)


def variables(level):
    """The environment of a test at a level of instructions."""
    # Leaks are those of Python and torch, which free nothing at their end.
    return {
        **os.environ,
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "CCE_CPU_LEVEL": level,
        "CXX": f"g++ {FLAGS} -fno-sanitize=vptr",  # of the lookup for serving, whose torch has none
        "PYTHONPATH": str(FOLDER),
        "OMP_NUM_THREADS": "1",
    }


def build():
    """The kernels with sanitizers, in a copy of the clone."""
    copy_clone(FOLDER)
    own = {**os.environ, "CFLAGS": FLAGS, "CXXFLAGS": FLAGS, "LDFLAGS": FLAGS}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=FOLDER, env=own, check=True)
    levels = LEVELS if sysconfig.get_platform().endswith("x86_64") else LEVELS[:1]
    built = list(FOLDER.glob("cce_torchrec/*/_native*.so"))
    if len(built) != 2 * len(levels):  # setup.py goes on without those that do not compile
        raise SystemExit(f"only {[file.name for file in built]} were built")


def check_that_errors_are_found():
    """Reads within a tensor and one beyond it, by a library built like the kernels."""
    source, library = FOLDER / "control.cpp", FOLDER / "control.so"
    source.write_text(CONTROL)
    flags = [*FLAGS.split(), "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    said = []
    for at in ("4", "5"):
        command = [sys.executable, "-c", READ, str(library), at]
        done = subprocess.run(command, env=variables("none"), capture_output=True, text=True)
        said.append(done.stdout + done.stderr)
    if "read 1" not in said[0] or "heap-buffer-overflow" not in said[1]:
        raise SystemExit(f"the sanitizers do not work here: {said[0]}\n{said[1]}")
    print("== a read beyond a tensor is found", flush=True)


def run_tests(level, names):
    """Whether the tests of files pass at a level."""
    began = time.monotonic()
    files = [f"tests/unit/test_{name}.py" for name in names]
    # Each process of Triton's interpreter or of FAISS has only code of others to show.
    options = [
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "-k",
        "not (sklearn or faiss or each_level)",
        *files,
    ]
    command = [sys.executable, "-m", "pytest", *options]
    status = subprocess.run(command, cwd=FOLDER, env=variables(level)).returncode
    print(f"== {level}: {', '.join(names)}: {time.monotonic() - began:.0f} s", flush=True)
    return status == 0


def main():
    if not shutil.which("g++"):
        raise SystemExit("the sanitizers are those of g++, which is not installed")
    build()
    check_that_errors_are_found()
    levels = LEVELS[: LEVELS.index(highest_level()) + 1]
    # The first level runs the lookup for serving too, which has one library for all.
    passed = [run_tests(level, KERNELS) for level in levels]
    passed += [run_tests(levels[-1], INFERENCE)]
    raise SystemExit(0 if all(passed) else "the sanitizers found errors, see above")


if __name__ == "__main__":
    main()
